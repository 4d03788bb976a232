#include <isobath/pipeline/evaluate.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/timer.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/model/head.hpp>
#include <isobath/pipeline/link.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/pipeline/versions.hpp>
#include <isobath/report/progress.hpp>
#include <nlohmann/json.hpp>

#include "sweep.hpp"

namespace isobath::pipeline {
namespace {

// Windows between two lines of a log.
constexpr int64_t kWindowsPerLine = 8;

// Rows of the per-token table that every window fills.
enum MetricRow { kNllOriginal, kNllQuantized, kKl, kSameTop1, kMetricRows };

/// The windows of this rank's replica on their way through all versions of the model, the original first.
class WindowPass {
 public:
  WindowPass(const Session& session, const data::TokenSet& tokens,
             const std::vector<const model::WeightStore*>& models)
      : session_(session),
        tokens_(tokens),
        models_(models),
        mine_(partition(tokens.n_sequences(), session.grid->shape().replicas, session.grid->replica())),
        rotary_(model::Rotary::make(session.model(), tokens.length(), session.device)),
        metrics_(
            at::zeros({tokens.n_sequences(), n_results(), kMetricRows, tokens.length() - 1}, at::kFloat)) {}

  /// [windows, results, rows, tokens]: this rank's windows, on the last stage; zero elsewhere.
  [[nodiscard]] at::Tensor& metrics() { return metrics_; }
  [[nodiscard]] int64_t n_results() const { return std::max<int64_t>(1, std::ssize(models_) - 1); }

  /// Window after window through the stages' resident blocks.
  void run_pipelined() {
    const int stage = session_.grid->stage(), n_stages = session_.grid->shape().stages;
    const auto options = at::TensorOptions().dtype(session_.dtype).device(session_.device);
    const std::vector<int64_t> shape{std::ssize(models_), 1, tokens_.length(), session_.model().d_model};
    Link link(session_.grid->pipeline(), session_.device, stage > 0 ? stage - 1 : -1,
              stage + 1 < n_stages ? stage + 1 : -1);
    report::Progress progress("evaluate", mine_.size(), "windows",
                              tokens_.length() * session_.grid->shape().replicas,
                              session_.world().rank() == 0);
    if (stage > 0 && mine_.size() > 0) link.expect(shape, options);
    for (int64_t window = mine_.begin; window < mine_.end; ++window) {
      const trace::Span span("evaluate window", window);
      const at::Tensor arrived = stage > 0 ? link.take() : at::Tensor();
      std::vector<at::Tensor> states;
      for (size_t i = 0; i < models_.size(); ++i) {
        at::Tensor hidden = stage > 0 ? arrived[static_cast<int64_t>(i)]
                                      : model::embed(models_[i]->embedding(), tokens_of(window));
        for (int64_t block = session_.my_blocks().begin; block < session_.my_blocks().end; ++block)
          hidden = model::block_forward(session_.model(), rotary_, models_[i]->block(block), hidden);
        states.push_back(std::move(hidden));
      }
      if (session_.is_last_stage())
        compare(window, states, heads_of_models());
      else
        link.send(at::stack(states));
      if (stage > 0 && window + 1 < mine_.end) link.expect(shape, options);
      progress.advance();
      const int64_t n_done = window - mine_.begin + 1;
      if (n_done % kWindowsPerLine == 0 || n_done == mine_.size())
        progress.note(fmt::format("evaluate: {} of {} windows of rank 0", n_done, mine_.size()));
    }
    link.flush();
  }

  /// All windows through one block after the other, version after version.
  void run_streamed() {
    report::Progress progress("evaluate", std::ssize(models_), "models", 0, session_.world().rank() == 0);
    std::vector<std::vector<at::Tensor>> states;  // [models][windows]
    for (const model::WeightStore* model : models_) {
      states.push_back(states_of(*model));
      progress.advance();
    }
    std::vector<model::HeadWeights> heads;
    session_.world().agree_on([&] {
      if (session_.is_last_stage()) heads = heads_of_models();
    });
    if (!session_.is_last_stage()) return;
    for (int64_t i = 0; i < mine_.size(); ++i) {
      std::vector<at::Tensor> of_window;
      for (std::vector<at::Tensor>& of_model : states)
        of_window.push_back(std::move(of_model[static_cast<size_t>(i)]));
      compare(mine_.begin + i, of_window, heads);
    }
  }

 private:
  [[nodiscard]] at::Tensor tokens_of(int64_t window) const {
    return tokens_.tokens.slice(0, window, window + 1).to(session_.device);
  }
  [[nodiscard]] std::vector<model::HeadWeights> heads_of_models() const {
    std::vector<model::HeadWeights> heads;
    for (const model::WeightStore* model : models_) heads.push_back(model->head());
    return heads;
  }

  // Output of the last block for each of this rank's windows, on the last stage.
  [[nodiscard]] std::vector<at::Tensor> states_of(const model::WeightStore& model) const {
    std::vector<at::Tensor> states;
    session_.world().agree_on([&] {
      if (session_.grid->stage() != 0) return;
      const at::Tensor embedding = model.embedding();
      for (int64_t window = mine_.begin; window < mine_.end; ++window)
        states.push_back(model::embed(embedding, tokens_of(window)));
    });
    const std::vector<int64_t> shape{1, tokens_.length(), session_.model().d_model};
    Sweep pass{.title = "evaluate",
               .blocks = {0, session_.model().n_blocks},
               .shapes = {static_cast<size_t>(mine_.size()), shape},
               .step =
                   [this](int64_t, const model::BlockWeights& weights, int64_t, const at::Tensor& hidden) {
                     return model::block_forward(session_.model(), rotary_, weights, hidden);
                   },
               .begin_block = {},
               .end_block = {}};
    return sweep(session_, model, pass, std::move(states));
  }

  void compare(int64_t window, const std::vector<at::Tensor>& states,
               const std::vector<model::HeadWeights>& heads) {
    std::vector<evaluate::Prediction> others;
    for (size_t i = 1; i < states.size(); ++i) others.push_back({&heads[i], states[i]});
    const std::vector<evaluate::TokenMetrics> found =
        evaluate::compare(session_.model(), {&heads[0], states[0]}, others, tokens_of(window));
    for (size_t i = 0; i < found.size(); ++i) {
      const at::Tensor rows = metrics_[window][static_cast<int64_t>(i)];
      rows[kNllOriginal].copy_(found[i].nll_original[0]);
      if (others.empty()) continue;
      rows[kNllQuantized].copy_(found[i].nll_quantized[0]);
      rows[kKl].copy_(found[i].kl[0]);
      rows[kSameTop1].copy_(found[i].same_top1[0]);
    }
  }

  const Session& session_;
  const data::TokenSet& tokens_;
  const std::vector<const model::WeightStore*>& models_;
  Range mine_;
  model::Rotary rotary_;
  at::Tensor metrics_;
};

}  // namespace

data::TokenSet open_evaluation(const Session& session) {
  const config::Evaluation& options = session.config.evaluation;
  data::TokenSet tokens = data::open_tokens(
      options.tokens, evaluation_requirements_of(session.config, session.model()), session.world());
  const at::Tensor padded = (tokens.lengths < tokens.length()).nonzero();
  session.world().agree_on([&] {
    if (padded.numel() > 0)
      fail<DataError>(
          "{}: window {} holds {} tokens and then padding, which nothing should be scored on; expected "
          "windows of {} tokens: make them without --pad, or set evaluation.window",
          options.tokens, padded[0][0].item<int64_t>(),
          tokens.lengths[padded[0][0].item<int64_t>()].item<int64_t>(), tokens.length());
  });
  return tokens;
}

std::vector<evaluate::Summary> evaluate_model(const Session& session, const data::TokenSet& tokens,
                                              const model::WeightStore& weights,
                                              const std::vector<std::filesystem::path>& quantized,
                                              report::EventLog& events) {
  const Timer timer;
  const at::NoGradGuard no_grad;
  const comm::Communicator& world = session.world();
  comm::Watchdog::set_activity("evaluate");
  const int64_t n_windows = tokens.n_sequences();

  std::vector<model::WeightStore> versions;
  for (const std::filesystem::path& path : quantized) versions.push_back(open_version(session, path));
  std::vector<const model::WeightStore*> models{&weights};
  for (const model::WeightStore& version : versions) models.push_back(&version);
  WindowPass pass(session, tokens, models);
  if (session.is_streamed())
    pass.run_streamed();
  else
    pass.run_pipelined();
  if (world.any(stop_requested()))
    fail<StopRequested>("stopped on request during evaluate; --resume evaluates again");

  // One rank filled each window; sums follow in window order.
  at::Tensor& metrics = pass.metrics();
  share_disjoint(metrics, world);
  std::vector<evaluate::Summary> summaries;
  for (int64_t i = 0; i < pass.n_results(); ++i) {
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

nlohmann::json to_json(const evaluate::Summary& summary, const data::TokenSet& tokens) {
  nlohmann::json json{{"window", tokens.length()},
                      {"windows", tokens.n_sequences()},
                      {"tokens_digest", tokens.digest},
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

std::string evaluation_json(const evaluate::Summary& summary, const data::TokenSet& tokens) {
  return to_json(summary, tokens).dump(2) + "\n";
}

bool is_evaluation_on(const std::string& json, const data::TokenSet& tokens) {
  const nlohmann::json found = nlohmann::json::parse(json, nullptr, /*allow_exceptions=*/false);
  return found.is_object() && found.contains("tokens_digest") && found["tokens_digest"] == tokens.digest;
}

std::string evaluations_json(const std::vector<std::filesystem::path>& quantized,
                             const std::vector<evaluate::Summary>& summaries, const data::TokenSet& tokens) {
  nlohmann::json all = nlohmann::json::array();
  for (size_t i = 0; i < summaries.size(); ++i) {
    nlohmann::json one = to_json(summaries[i], tokens);
    one["checkpoint"] = quantized[i].string();
    all.push_back(std::move(one));
  }
  return all.dump(2) + "\n";
}

}  // namespace isobath::pipeline
