#pragma once
#include <filesystem>
#include <isobath/evaluate/token_metrics.hpp>
#include <isobath/pipeline/session.hpp>
#include <isobath/report/events.hpp>

namespace isobath::pipeline {

/// The windows of evaluation.tokens. Collective over the session's world. Throws AgreedFailure: data, also
/// when a window ends in padding.
[[nodiscard]] data::TokenSet open_evaluation(const Session& session);

/// Perplexity of the original model, and of each checkpoint of `quantized` with KL and top-1 agreement, in
/// one streaming pass: windows flow through the stages with the hidden states of all models, the last stage
/// compares, no logits are stored. One summary a checkpoint, or the original's alone when there is none.
///
/// `tokens`: of open_evaluation. `weights`: the original's. Memory: one window's hidden states a stage, all
/// models' stage weights; with streamed weights two blocks, and on the last stage the hidden states of its
/// windows of all models. Same numbers. Collective over the session's world; the summaries are the same on
/// every rank and for every grid.
[[nodiscard]] std::vector<evaluate::Summary> evaluate_model(
    const Session& session, const data::TokenSet& tokens, const model::WeightStore& weights,
    const std::vector<std::filesystem::path>& quantized, report::EventLog& events);

/// evaluation.json: the summary, with the windows it holds for.
[[nodiscard]] std::string evaluation_json(const evaluate::Summary& summary, const data::TokenSet& tokens);

/// Whether `json`, the text of an evaluation.json, is about these windows.
[[nodiscard]] bool is_evaluation_on(const std::string& json, const data::TokenSet& tokens);

/// A list of such objects, each with its `checkpoint`.
[[nodiscard]] std::string evaluations_json(const std::vector<std::filesystem::path>& quantized,
                                           const std::vector<evaluate::Summary>& summaries,
                                           const data::TokenSet& tokens);

}  // namespace isobath::pipeline
