#include <isobath/pipeline/diagnose.hpp>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <isobath/comm/watchdog.hpp>
#include <isobath/core/log.hpp>
#include <isobath/core/stop_signal.hpp>
#include <isobath/core/trace.hpp>
#include <isobath/io/files.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <isobath/model/head.hpp>
#include <isobath/pipeline/evaluate.hpp>
#include <isobath/pipeline/share.hpp>
#include <isobath/pipeline/statistics_files.hpp>
#include <isobath/pipeline/versions.hpp>
#include <isobath/report/progress.hpp>
#include <isobath/sensitivity/perturbation.hpp>
#include <isobath/sensitivity/token_weights.hpp>
#include <nlohmann/json.hpp>
#include <numeric>

#include "diagnosis.hpp"

namespace isobath::pipeline {
namespace {

namespace fs = std::filesystem;
using model::Projection;

/// Of ΔW, for the curvature ratio: small enough for the quadratic zone, large enough for f32.
constexpr double kSmallStep = 0.1;
constexpr int64_t kMaxModulesBytes = int64_t{1} << 28;

// Whole models on every rank, sequences dealt one by one, f32.
config::RunConfig probe_config(const config::RunConfig& config, const DiagnoseRequest& request, int n_ranks) {
  config::RunConfig probe = config;
  probe.ranks.stages = 1;
  probe.ranks.replicas = n_ranks;
  probe.compute_dtype = "float32";
  probe.residency = "resident";  // every block is visited for every linear that is measured
  if (!request.tokens.empty()) probe.calibration.tokens = request.tokens;
  probe.calibration.sequences = request.sequences;
  probe.calibration.logical_shards = request.sequences;
  probe.calibration.microbatch = 1;
  return probe;
}

// `n_chosen` of `n` places, ascending, spread over them without a period: equal steps would meet one kind of
// linear only wherever they are a multiple of seven.
std::vector<int64_t> spread_places(int64_t n, int64_t n_chosen) {
  constexpr double kGoldenRatio = 0.6180339887498949;
  std::vector<int64_t> places(static_cast<size_t>(n));
  std::iota(places.begin(), places.end(), 0);
  const auto key = [](int64_t place) { return std::fmod(static_cast<double>(place) * kGoldenRatio, 1.0); };
  std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
  places.resize(static_cast<size_t>(n_chosen));
  std::sort(places.begin(), places.end());
  return places;
}

class Diagnosing {
 public:
  Diagnosing(const Session& session, const CalibrationSet& probe, const model::WeightStore& original,
             const model::WeightStore& quantized, const DiagnoseRequest& request)
      : session_(session),
        probe_(probe),
        original_(original),
        embedding_(original.embedding()),
        head_(original.head()),
        quantized_(quantized),
        n_samples_(request.samples),
        rotary_(model::Rotary::make(session.model(), probe.tokens.length(), session.device)) {
    choose_parts(request);
    const int64_t n = probe.tokens.n_sequences(), n_modules = std::ssize(found_.modules);
    found_.n_tokens = at::zeros({n}, at::kDouble);
    found_.first_order = at::zeros({n, n_modules}, at::kDouble);
    found_.fisher = at::zeros({n, n_samples_, n_modules}, at::kDouble);
    found_.weighted_change = at::zeros({n, n_modules}, at::kDouble);
    found_.changes = at::zeros({n, std::ssize(found_.measured), kMeasuredColumns}, at::kDouble);
  }

  Diagnosis run() {
    const at::NoGradGuard no_grad;
    const comm::Communicator& world = session_.world();
    comm::Watchdog::set_activity("diagnose");
    const std::vector<data::Microbatch> mine =
        probe_.shards.microbatches_of(session_.grid->replica(), session_.grid->shape().replicas);
    report::Progress progress("diagnose", std::ssize(mine) * (1 + std::ssize(found_.measured)), "parts", 0,
                              world.rank() == 0);
    for (const data::Microbatch& sequence : mine) {
      observe(sequence, progress);
      if (stop_requested()) break;
    }
    if (world.any(stop_requested()))
      fail<StopRequested>("stopped on request during diagnose; nothing was written");
    for (at::Tensor* table :
         {&found_.n_tokens, &found_.first_order, &found_.fisher, &found_.weighted_change, &found_.changes})
      share_disjoint(*table, world);
    return std::move(found_);
  }

 private:
  void choose_parts(const DiagnoseRequest& request) {
    std::vector<DiagnosedPart> blocks;
    for (int64_t block = 0; block < session_.model().n_blocks; ++block) {
      DiagnosedPart whole{.block = block, .projections = {}, .name = fmt::format("block {}", block)};
      for (int p = 0; p < model::kProjections; ++p) {
        const auto projection = static_cast<Projection>(p);
        const std::string name = model::module_name(block, projection);
        if (!config::choice_for(session_.config.quantization, name).quantized) continue;
        place_of_[{block, projection}] = std::ssize(found_.modules);
        found_.modules.push_back({block, {projection}, name});
        whole.projections.push_back(projection);
      }
      if (!whole.projections.empty()) blocks.push_back(std::move(whole));
    }
    const int64_t n_modules = std::ssize(found_.modules);
    const int64_t n_measured = request.only_blocks    ? 0
                               : request.modules == 0 ? n_modules
                                                      : std::min(request.modules, n_modules);
    for (const int64_t place : spread_places(n_modules, n_measured)) {
      found_.module_of.push_back(place);
      found_.measured.push_back(found_.modules[static_cast<size_t>(place)]);
    }
    for (DiagnosedPart& block : blocks) {
      found_.module_of.push_back(-1);
      found_.measured.push_back(std::move(block));
    }
  }

  void observe(const data::Microbatch& sequence, report::Progress& progress) {
    const trace::Span span("diagnose sequence", sequence.index);
    const at::Tensor tokens = probe_.tokens_of(sequence.sequences).to(session_.device);
    std::vector<at::Tensor> inputs;  // of each block
    at::Tensor hidden = model::embed(embedding_, tokens);
    for (int64_t block = 0; block < session_.model().n_blocks; ++block) {
      inputs.push_back(hidden);
      hidden = model::block_forward(session_.model(), rotary_, original_.block(block), hidden);
    }
    score(sequence, tokens, inputs, hidden);
    progress.advance();
    for (size_t part = 0; part < found_.measured.size(); ++part) {
      measure_part(part, sequence, tokens, inputs, hidden);
      progress.advance();
    }
  }

  // ⟨G, X ΔWᵀ⟩ of every linear in one backward pass for the data's labels and one a draw.
  void score(const data::Microbatch& sequence, const at::Tensor& tokens,
             const std::vector<at::Tensor>& inputs, const at::Tensor& last) {
    const auto loss_of = [&](model::LossKind kind, int64_t n_samples) {
      return model::loss_and_gradient(
          session_.model(), head_, last, tokens, probe_.lengths_of(sequence.sequences), sequence.sequences,
          {.kind = kind, .n_samples = n_samples, .seed = session_.config.calibration.seed});
    };
    const model::LossResult data = loss_of(model::LossKind::nll, 1);
    found_.n_tokens[sequence.index] = static_cast<double>(data.n_predicted);
    at::Tensor gradients = at::cat({data.gradient, loss_of(model::LossKind::fisher, n_samples_).gradient});
    const at::Tensor mask = probe_.mask_of(sequence.sequences);
    for (int64_t block = session_.model().n_blocks - 1; block >= 0; --block) {
      const model::BlockWeights weights = original_.block(block);
      model::BlockActivations activations;
      (void)model::block_forward(session_.model(), rotary_, weights, inputs[static_cast<size_t>(block)],
                                 &activations);
      std::vector<at::Tensor> before;
      for (int64_t draw = 0; draw <= n_samples_; ++draw)
        before.push_back(model::block_backward(
            session_.model(), rotary_, weights, activations, gradients[draw],
            [&](Projection projection, const at::Tensor& x, const at::Tensor& gradient) {
              score_linear({block, projection}, sequence, draw, x, gradient, mask);
            }));
      gradients = at::stack(before);
    }
  }

  // draw 0: labels of the data.
  void score_linear(const std::pair<int64_t, Projection>& key, const data::Microbatch& sequence, int64_t draw,
                    const at::Tensor& x, const at::Tensor& gradient, const at::Tensor& mask) {
    const auto place = place_of_.find(key);
    if (place == place_of_.end()) return;
    const auto& [block, projection] = key;
    const at::Tensor before = original_.block(block)[projection].weight,
                     after = quantized_.block(block)[projection].weight;
    const sensitivity::PerturbationScores scores = sensitivity::perturbation_scores(
        x, gradient, mask, sensitivity::token_weights(gradient, 1).select(2, 0), 1,
        [&](int64_t, Range rows) {
          return after.slice(0, rows.begin, rows.end) - before.slice(0, rows.begin, rows.end);
        },
        {.first_sequence = sequence.sequences.begin,
         .sample = draw,
         .n_probes = session_.config.sensitivity.probes,
         .seed = session_.config.calibration.seed});
    const at::Tensor first_order = scores.first_order[0][0];
    if (draw == 0) {
      found_.first_order[sequence.index][place->second] = first_order;
      return;
    }
    found_.fisher[sequence.index][draw - 1][place->second] = first_order;
    found_.weighted_change[sequence.index][place->second] +=
        scores.weighted_change[0][0] / static_cast<double>(n_samples_);
  }

  // The model with only this part replaced, by all and by a tenth of the change.
  void measure_part(size_t part, const data::Microbatch& sequence, const at::Tensor& tokens,
                    const std::vector<at::Tensor>& inputs, const at::Tensor& last) {
    const DiagnosedPart& chosen = found_.measured[part];
    const at::Tensor& input = inputs[static_cast<size_t>(chosen.block)];
    std::vector<at::Tensor> states;
    for (const double step : {1.0, kSmallStep}) {
      model::BlockWeights changed = original_.block(chosen.block);
      for (const Projection projection : chosen.projections)
        changed[projection].weight =
            at::lerp(changed[projection].weight, quantized_.block(chosen.block)[projection].weight, step);
      states.push_back(model::block_forward(session_.model(), rotary_, changed, input));
    }
    at::Tensor hidden = at::cat(states);
    for (int64_t block = chosen.block + 1; block < session_.model().n_blocks; ++block)
      hidden = model::block_forward(session_.model(), rotary_, original_.block(block), hidden);
    // Padding predicts nothing.
    const auto length = probe_.lengths_of(sequence.sequences)[0].item<int64_t>();
    const auto real = [&](const at::Tensor& all) { return all.slice(1, 0, length); };
    const std::vector<evaluate::TokenMetrics> found = evaluate::compare(
        session_.model(), {&head_, real(last)},
        {{&head_, real(hidden.slice(0, 0, 1))}, {&head_, real(hidden.slice(0, 1, 2))}}, real(tokens));
    const at::Tensor row = found_.changes[sequence.index][static_cast<int64_t>(part)];
    row[kKl] = found[0].kl.sum(at::kDouble);
    row[kKlOfTenth] = found[1].kl.sum(at::kDouble);
    row[kNllChange] = found[0].nll_quantized.sum(at::kDouble) - found[0].nll_original.sum(at::kDouble);
  }

  const Session& session_;
  const CalibrationSet& probe_;
  const model::WeightStore& original_;
  at::Tensor embedding_;
  model::HeadWeights head_;
  const model::WeightStore& quantized_;
  int64_t n_samples_;
  model::Rotary rotary_;
  std::map<std::pair<int64_t, Projection>, int64_t> place_of_;  // of a linear in modules
  Diagnosis found_;
};

// What the run's own files say of each linear; nothing where it did not measure.
void add_statistics(const config::RunConfig& config, const Session& session, Diagnosis& diagnosis) {
  diagnosis.cross_token_mass.resize(diagnosis.modules.size());
  diagnosis.effective_per_channel.resize(diagnosis.modules.size());
  const fs::path statistics = config.sensitivity.reuse.empty() ? fs::path(config.output) / "measure"
                                                               : fs::path(config.sensitivity.reuse);
  if (fs::exists(statistics_path(statistics, 0))) {
    require_header("diagnose", statistics, {{"model", session.source->tensors().fingerprint()}},
                   session.model().n_blocks);
    for (size_t m = 0; m < diagnosis.modules.size(); ++m) {
      const DiagnosedPart& module = diagnosis.modules[m];
      const io::Hdf5Reader file(statistics_path(statistics, module.block));
      const std::string group(model::name_of(module.projections[0]));
      if (!file.contains(group + "/alpha_per_sequence")) continue;
      const auto total = [&](const char* name) {
        return file.read(group + "/" + name).to(at::kDouble).sum().item<double>();
      };
      if (const double per_sequence = total("alpha_per_sequence"); per_sequence > 0)
        diagnosis.cross_token_mass[m] = 1 - total("alpha_per_token") / per_sequence;
    }
  }
  const fs::path records = fs::path(config.output) / "modules.json";
  if (!fs::exists(records)) return;
  std::map<std::string, double> effective;
  try {
    for (const nlohmann::json& record : nlohmann::json::parse(io::read_text(records, kMaxModulesBytes)))
      if (record.contains("effective_samples_per_channel"))
        effective[record.at("module")] = record.at("effective_samples_per_channel");
  } catch (const nlohmann::json::exception& error) {
    fail<DataError>("{}: expected the list of records that quantize leaves: {}", records.string(),
                    error.what());
  }
  for (size_t m = 0; m < diagnosis.modules.size(); ++m)
    if (const auto found = effective.find(diagnosis.modules[m].name); found != effective.end())
      diagnosis.effective_per_channel[m] = found->second;
}

}  // namespace

void diagnose(const config::RunConfig& config, const DiagnoseRequest& request,
              const comm::Communicator& world) {
  comm::Watchdog::configure(std::chrono::seconds(0));  // ranks with a sequence less wait for the others
  const fs::path checkpoint =
      request.checkpoint.empty() ? fs::path(config.output) / "model" : request.checkpoint;
  world.agree(fs::exists(checkpoint / "config.json")
                  ? ""
                  : fmt::format("{} holds no quantized model; `isobath quantize` or `isobath run` makes one, "
                                "or name another with --checkpoint",
                                checkpoint.string()),
              ExitCode::config);
  const Session session = open_session(probe_config(config, request, world.size()), request.sequences, world);
  const CalibrationSet probe = open_calibration(session);
  const model::WeightStore original = open_weights(session, session.source);
  const model::WeightStore quantized = open_version(session, checkpoint);
  Diagnosis diagnosis = Diagnosing(session, probe, original, quantized, request).run();
  std::string table;
  world.agree_on([&] {
    if (world.rank() != 0) return;
    add_statistics(config, session, diagnosis);
    const DiagnosisReport report = report_of(diagnosis, request);
    const fs::path output =
        request.output.empty() ? fs::path(config.output) / "diagnose.json" : request.output;
    io::write_text_atomically(output, report.json);
    table = report.table + fmt::format("in {}\n", output.string());
  });
  log::print(table);
}

}  // namespace isobath::pipeline
