#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/io/safetensors_writer.hpp>
#include <isobath/model/checkpoint_reader.hpp>
#include <map>

#include "model/scratch_directory.hpp"

namespace isobath::model {
namespace {

constexpr const char* kGate = "model.layers.1.mlp.gate_proj";

/// The tiny model of tests/data with some tensors changed.
class EditedCheckpoint : public testing::Test {
 protected:
  void SetUp() override { load("b"); }
  void load(const std::string& letter) {
    const auto source = std::filesystem::path(ISOBATH_TEST_DATA) / ("tiny_llama_" + letter);
    std::filesystem::copy_file(source / "config.json", scratch_.path() / "config.json",
                               std::filesystem::copy_options::overwrite_existing);
    const io::ShardedReader reader(source);
    tensors_.clear();
    for (const std::string& name : reader.names()) tensors_[name] = reader.read(name);
  }
  CheckpointReader open(WeightDecoder decoder = {}) {
    io::write_safetensors(scratch_.path() / "model.safetensors", {tensors_.begin(), tensors_.end()}, {});
    return CheckpointReader(scratch_.path(), std::move(decoder));
  }
  std::string complaint() {
    try {
      (void)open();
    } catch (const DataError& error) {
      return error.what();
    }
    return "";
  }

  ScratchDirectory scratch_{"checkpoint_reader_test"};
  std::map<std::string, at::Tensor> tensors_;
};

TEST_F(EditedCheckpoint, ReadsWeightsInTheComputeDtype) {
  const CheckpointReader checkpoint = open();
  const BlockWeights block = checkpoint.read_block(1, at::kBFloat16, at::kCPU);

  EXPECT_TRUE(at::equal(block[Projection::gate].weight,
                        tensors_.at(std::string(kGate) + ".weight").to(at::kBFloat16)));
  EXPECT_TRUE(
      at::equal(block[Projection::gate].bias, tensors_.at(std::string(kGate) + ".bias").to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(block.post_attention_norm,
                        tensors_.at("model.layers.1.post_attention_layernorm.weight").to(at::kBFloat16)));
}

TEST_F(EditedCheckpoint, TiedHeadIsTheEmbedding) {
  const CheckpointReader checkpoint = open();

  EXPECT_FALSE(checkpoint.tensors().contains("lm_head.weight"));
  EXPECT_TRUE(at::equal(checkpoint.read_head(at::kFloat, at::kCPU).lm_head,
                        checkpoint.read_embedding(at::kFloat, at::kCPU)));
}

TEST_F(EditedCheckpoint, TiedHeadThatIsStoredIsUsed) {
  tensors_["lm_head.weight"] = tensors_.at("model.embed_tokens.weight") * 2;

  EXPECT_TRUE(at::equal(open().read_head(at::kFloat, at::kCPU).lm_head, tensors_.at("lm_head.weight")));
}

TEST_F(EditedCheckpoint, NamesAMissingTensor) {
  tensors_.erase("model.layers.0.self_attn.q_proj.bias");
  const std::string message = complaint();

  EXPECT_NE(message.find("model.layers.0.self_attn.q_proj.bias is missing; expected shape [64]"),
            std::string::npos)
      << message;
}

TEST_F(EditedCheckpoint, AnUntiedModelNeedsItsHead) {
  load("a");
  tensors_.erase("lm_head.weight");

  EXPECT_NE(complaint().find("lm_head.weight"), std::string::npos);
}

TEST_F(EditedCheckpoint, NamesShardTensorAndBothShapes) {
  tensors_[std::string(kGate) + ".weight"] = at::zeros({64, 128});
  const std::string message = complaint();

  EXPECT_NE(message.find("shard model.safetensors"), std::string::npos) << message;
  EXPECT_NE(message.find(std::string(kGate) + ".weight: expected shape [128, 64], found [64, 128]"),
            std::string::npos)
      << message;
}

TEST_F(EditedCheckpoint, NamesADtypeThatIsNoWeight) {
  tensors_["model.norm.weight"] = at::zeros({64}, at::kInt);
  const std::string message = complaint();

  EXPECT_NE(message.find("model.norm.weight: expected dtype BFloat16, Half or Float, found Int"),
            std::string::npos)
      << message;
}

TEST_F(EditedCheckpoint, ReportsTheFirstProblemOfEachKindAndTheirNumber) {
  tensors_.erase("model.layers.0.self_attn.q_proj.bias");
  tensors_.erase("model.layers.1.self_attn.q_proj.bias");
  tensors_["model.norm.weight"] = at::zeros({65});
  const std::string message = complaint();

  EXPECT_NE(message.find("model.layers.0.self_attn.q_proj.bias is missing"), std::string::npos) << message;
  EXPECT_EQ(message.find("model.layers.1"), std::string::npos) << message;
  EXPECT_NE(message.find("found [65]"), std::string::npos) << message;
  EXPECT_NE(message.find("3 problems in all"), std::string::npos) << message;
}

TEST_F(EditedCheckpoint, NamesAWeightThatIsNotFinite) {
  const std::string name = std::string(kGate) + ".weight";
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
    tensors_[name] = tensors_[name].clone();
    tensors_[name][5][7] = value;
    const CheckpointReader checkpoint = open();
    EXPECT_NO_THROW((void)checkpoint.read_block(0, at::kFloat, at::kCPU));
    try {
      (void)checkpoint.read_block(1, at::kFloat, at::kCPU);
      ADD_FAILURE() << "a weight of " << value << " went through";
    } catch (const NumericError& error) {
      EXPECT_NE(std::string(error.what()).find(name + ": 1 of 8192 values"), std::string::npos)
          << error.what();
    }
  }
}

TEST_F(EditedCheckpoint, NamesAWeightThatOverflowsTheComputeDtype) {
  tensors_["model.norm.weight"] = at::full({64}, 1e6);
  const CheckpointReader checkpoint = open();

  EXPECT_NO_THROW((void)checkpoint.read_head(at::kBFloat16, at::kCPU));
  EXPECT_THROW((void)checkpoint.read_head(at::kHalf, at::kCPU), NumericError);
}

TEST_F(EditedCheckpoint, AsksTheDecoderForModulesWithoutAPlainWeight) {
  const at::Tensor weight = tensors_.at(std::string(kGate) + ".weight");
  tensors_.erase(std::string(kGate) + ".weight");
  tensors_[std::string(kGate) + ".weight_packed"] = at::zeros({128, 8}, at::kInt);
  EXPECT_NE(complaint().find(std::string(kGate) + ".weight is missing"), std::string::npos);

  std::vector<std::string> asked;
  const CheckpointReader checkpoint = open([&](const io::ShardedReader&, const std::string& module) {
    asked.push_back(module);
    return weight;
  });
  EXPECT_TRUE(at::equal(checkpoint.read_block(1, at::kFloat, at::kCPU)[Projection::gate].weight, weight));
  EXPECT_EQ(asked, std::vector<std::string>{kGate});
}

TEST_F(EditedCheckpoint, RefusesADecodedWeightOfAnotherShape) {
  tensors_.erase(std::string(kGate) + ".weight");
  tensors_[std::string(kGate) + ".weight_packed"] = at::zeros({128, 8}, at::kInt);
  const auto wrong = [](const io::ShardedReader&, const std::string&) { return at::zeros({128, 63}); };
  const auto none = [](const io::ShardedReader&, const std::string&) { return at::Tensor(); };

  EXPECT_THROW((void)open(wrong).read_block(1, at::kFloat, at::kCPU), DataError);
  EXPECT_THROW((void)open(none).read_block(1, at::kFloat, at::kCPU), DataError);
}

TEST_F(EditedCheckpoint, EveryTensorIsALinearWeightOrOfABlockOrOutside) {
  const CheckpointReader checkpoint = open();
  std::vector<std::string> names = checkpoint.tensors_outside_blocks();
  EXPECT_EQ(names, (std::vector<std::string>{"model.embed_tokens.weight", "model.norm.weight"}));
  for (int64_t block = 0; block < checkpoint.config().n_blocks; ++block) {
    const auto others = checkpoint.other_tensors_of_block(block);
    EXPECT_EQ(others.size(), 2U + kProjections) << "two norms and seven biases";
    names.insert(names.end(), others.begin(), others.end());
    for (int p = 0; p < kProjections; ++p)
      names.push_back(module_name(block, static_cast<Projection>(p)) + ".weight");
  }
  std::sort(names.begin(), names.end());
  std::vector<std::string> expected;
  for (const auto& [name, tensor] : tensors_) expected.push_back(name);
  EXPECT_EQ(names, expected);
}

}  // namespace
}  // namespace isobath::model
