#pragma once
#include <filesystem>
#include <isobath/checkpoint/generation_store.hpp>
#include <isobath/model/weight_store.hpp>
#include <isobath/pipeline/session.hpp>
#include <isobath/report/events.hpp>

namespace isobath::pipeline {

struct TuneResult {
  double wall_s = 0;
  int64_t n_steps = 0;
  /// KL of the original to the quantized model on the calibration tokens, nats per token: of the first epoch,
  /// whose scales change on the way, and of the last.
  double kl_first = 0, kl_last = 0;
};

/// Tunes the scales of a quantized checkpoint by the divergence of the original's predictions from its own,
/// on the calibration tokens: `quantization.tuning.epochs` times through them, a step of Adam after every
/// `steps`-th part, each a forward and a backward pass of the quantized model, pipelined (1F1B). Codes and
/// zeros stay. The same bytes for any grid.
///
/// original   the session's weights, which are let go once the original's predictions are there. untuned: a
///            checkpoint of this model, written by `quantize`. run: where model/ is written.
///
/// Memory   as measure, of the quantized weights; their codes (1 byte a weight) and 19 bytes a scale, on the
///          device; on the last stage the original's last hidden states of the replica's sequences.
/// Network  as measure; after each step the gradient of the stage's scales over the replicas, f32.
/// Source   METHOD §4; Chen et al., EfficientQAT (2024), second phase; there with data labels.
///
/// Saves its steps (12 bytes a scale) in the generations of `quantize`, in run/checkpoint, as often as
/// `checkpoint` says, a step for a block, and goes on from the newest one. Collective over the session's
/// world. Throws AgreedFailure: config with streamed weights, data for a checkpoint that is none, checkpoint
/// when no generation vouches for the files of `untuned`; StopRequested, with the last step saved;
/// NumericError.
TuneResult tune_scales(const Session& session, const CalibrationSet& calibration, model::WeightStore original,
                       const std::filesystem::path& untuned, const std::filesystem::path& run,
                       const checkpoint::Fingerprint& fingerprint, report::EventLog& events);

}  // namespace isobath::pipeline
