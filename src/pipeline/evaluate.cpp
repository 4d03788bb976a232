#include <isobath/pipeline/evaluate.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/model/head.hpp>
#include <isobath/pipeline/link.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/report/progress.hpp>
#include <nlohmann/json.hpp>

namespace isobath::pipeline {
namespace {

// Windows between two lines of a log.
constexpr int64_t kWindowsPerLine = 8;

// Rows of the per-token table that every window fills.
enum MetricRow { kNllOriginal, kNllQuantized, kKl, kSameTop1, kMetricRows };

at::Tensor through_stage(const Session& session, const model::Rotary& rotary, const StageWeights& weights,
                         at::Tensor hidden) {
  for (const auto& [block, block_weights] : weights.blocks)
    hidden = model::block_forward(session.model(), rotary, block_weights, hidden);
  return hidden;
}

}  // namespace

StageWeights load_version(const Session& session, const std::filesystem::path& quantized) {
  std::unique_ptr<model::CheckpointReader> reader;
  session.world().agree_on([&] {
    const auto schemes = std::make_shared<const formats::compressed_tensors::SchemeTable>(quantized);
    reader = std::make_unique<model::CheckpointReader>(
        quantized, [schemes](const io::ShardedReader& shards, const std::string& module) {
          return schemes->decode(shards, module);
        });
    const model::ModelConfig &a = session.model(), &b = reader->config();
    if (a.vocab_size != b.vocab_size || a.n_blocks != b.n_blocks || a.d_model != b.d_model)
      fail<DataError>("{} is not a version of {}: blocks {} and {}, d_model {} and {}, vocabulary {} and {}",
                      quantized.string(), session.config.model, b.n_blocks, a.n_blocks, b.d_model, a.d_model,
                      b.vocab_size, a.vocab_size);
  });
  return load_stage(session, *reader);
}

std::vector<evaluate::Summary> evaluate_model(const Session& session, const StageWeights& weights,
                                              const std::vector<std::filesystem::path>& quantized,
                                              report::EventLog& events) {
  const Timer timer;
  const at::NoGradGuard no_grad;
  const config::Evaluation& options = session.config.evaluation;
  const comm::Communicator& world = session.world();
  const int stage = session.grid->stage(), n_stages = session.grid->shape().stages;
  comm::Watchdog::set_activity("evaluate");
  const data::TokenSet tokens = data::open_tokens(options.tokens,
                                                  {.vocab_size = session.model().vocab_size,
                                                   .tokenizer_sha256 = tokenizer_digest(session.config.model),
                                                   .n_sequences = options.windows,
                                                   .length = options.window},
                                                  world);
  const int64_t n_windows = tokens.n_sequences(), n_predicted = tokens.length() - 1;

  // Each stage holds its blocks of all models, the original first.
  std::vector<StageWeights> versions;
  for (const std::filesystem::path& path : quantized) versions.push_back(load_version(session, path));
  std::vector<const StageWeights*> models{&weights};
  for (const StageWeights& version : versions) models.push_back(&version);
  const auto n_models = static_cast<int64_t>(models.size()), n_results = std::max<int64_t>(1, n_models - 1);
  const int64_t n_replicas = session.grid->shape().replicas;
  const Range mine = partition(n_windows, n_replicas, session.grid->replica());
  const model::Rotary rotary = model::Rotary::make(session.model(), tokens.length(), session.device);
  const auto tensor_options = at::TensorOptions().dtype(session.dtype).device(session.device);
  const std::vector<int64_t> shape{n_models, 1, tokens.length(), session.model().d_model};
  at::Tensor metrics = at::zeros({n_windows, n_results, kMetricRows, n_predicted}, at::kFloat);
  {
    Link link(session.grid->pipeline(), session.device, stage > 0 ? stage - 1 : -1,
              stage + 1 < n_stages ? stage + 1 : -1);
    report::Progress progress("evaluate", mine.size(), "windows", tokens.length() * n_replicas,
                              world.rank() == 0);
    if (stage > 0 && mine.size() > 0) link.expect(shape, tensor_options);
    for (int64_t window = mine.begin; window < mine.end; ++window) {
      const trace::Span span("evaluate window", window);
      const at::Tensor window_tokens = tokens.tokens.slice(0, window, window + 1).to(session.device);
      at::Tensor hidden;
      if (stage > 0) {
        hidden = link.take();
      } else {
        std::vector<at::Tensor> embedded;
        for (const StageWeights* one : models)
          embedded.push_back(model::embed(one->embedding, window_tokens));
        hidden = at::stack(embedded);
      }
      std::vector<at::Tensor> states;
      for (int64_t i = 0; i < n_models; ++i)
        states.push_back(through_stage(session, rotary, *models[static_cast<size_t>(i)], hidden[i]));
      if (session.is_last_stage()) {
        std::vector<evaluate::Prediction> others;
        for (size_t i = 1; i < models.size(); ++i) others.push_back({&models[i]->head, states[i]});
        const std::vector<evaluate::TokenMetrics> found =
            evaluate::compare(session.model(), {&weights.head, states[0]}, others, window_tokens);
        for (size_t i = 0; i < found.size(); ++i) {
          const at::Tensor rows = metrics[window][static_cast<int64_t>(i)];
          rows[kNllOriginal].copy_(found[i].nll_original[0]);
          if (quantized.empty()) continue;
          rows[kNllQuantized].copy_(found[i].nll_quantized[0]);
          rows[kKl].copy_(found[i].kl[0]);
          rows[kSameTop1].copy_(found[i].same_top1[0]);
        }
      } else {
        link.send(at::stack(states));
      }
      if (stage > 0 && window + 1 < mine.end) link.expect(shape, tensor_options);
      progress.advance();
      const int64_t n_done = window - mine.begin + 1;
      if (n_done % kWindowsPerLine == 0 || n_done == mine.size())
        progress.note(fmt::format("evaluate: {} of {} windows of rank 0", n_done, mine.size()));
    }
    link.flush();
  }
  if (world.any(stop_requested()))
    fail<StopRequested>("stopped on request during evaluate; --resume evaluates again");

  // One rank filled each window; sums follow in window order.
  share_disjoint(metrics, world);
  std::vector<evaluate::Summary> summaries;
  for (int64_t i = 0; i < n_results; ++i) {
    std::vector<evaluate::TokenMetrics> windows;
    for (int64_t window = 0; window < n_windows; ++window) {
      const at::Tensor rows = metrics[window][i].unsqueeze(1);
      evaluate::TokenMetrics one;
      one.nll_original = rows[kNllOriginal];
      if (!quantized.empty()) {
        one.nll_quantized = rows[kNllQuantized];
        one.kl = rows[kKl];
        one.same_top1 = rows[kSameTop1].to(at::kByte);
      }
      windows.push_back(std::move(one));
    }
    const evaluate::Summary& summary = summaries.emplace_back(evaluate::summarise(windows));
    events.write("evaluated",
                 {{"checkpoint", quantized.empty() ? "" : quantized[static_cast<size_t>(i)].string()},
                  {"seconds", timer.seconds()},
                  {"perplexity", summary.perplexity},
                  {"perplexity_original", summary.perplexity_original},
                  {"kl_mean", summary.kl_mean}});
  }
  return summaries;
}

namespace {

nlohmann::json to_json(const evaluate::Summary& summary, const config::Evaluation& options) {
  nlohmann::json json{{"window", options.window},
                      {"windows", options.windows},
                      {"tokens", summary.n_tokens},
                      {"perplexity_original", summary.perplexity_original}};
  if (summary.has_quantized) {
    json["perplexity"] = summary.perplexity;
    json["kl_mean"] = summary.kl_mean;
    json["kl_median"] = summary.kl_median;
    json["kl_p99"] = summary.kl_p99;
    json["top1_agreement"] = summary.top1_agreement;
  }
  return json;
}

}  // namespace

std::string evaluation_json(const evaluate::Summary& summary, const config::Evaluation& options) {
  return to_json(summary, options).dump(2) + "\n";
}

std::string evaluations_json(const std::vector<std::filesystem::path>& quantized,
                             const std::vector<evaluate::Summary>& summaries,
                             const config::Evaluation& options) {
  nlohmann::json all = nlohmann::json::array();
  for (size_t i = 0; i < summaries.size(); ++i) {
    nlohmann::json one = to_json(summaries[i], options);
    one["checkpoint"] = quantized[i].string();
    all.push_back(std::move(one));
  }
  return all.dump(2) + "\n";
}

}  // namespace isobath::pipeline
