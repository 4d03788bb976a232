#pragma once
#include <filesystem>
#include <isobath/evaluate/token_metrics.hpp>
#include <isobath/pipeline/session.hpp>
#include <isobath/report/events.hpp>

namespace isobath::pipeline {

/// Perplexity of the original model, and of `quantized` with KL and top-1 agreement when it is not empty, in
/// one streaming pass: windows flow through the stages with the hidden states of both models, the last stage
/// compares, no logits are stored.
///
/// `weights`: the original's stage weights. Memory: one window's hidden states a stage, both models' stage
/// weights. Collective over the session's world; the summary is the same on every rank and for every grid.
[[nodiscard]] evaluate::Summary evaluate_model(const Session& session, const StageWeights& weights,
                                               const std::filesystem::path& quantized,
                                               report::EventLog& events);

/// evaluation.json: the summary with the options it holds for.
[[nodiscard]] std::string evaluation_json(const evaluate::Summary& summary,
                                          const config::Evaluation& options);

}  // namespace isobath::pipeline
