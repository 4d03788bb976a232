#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/formats/packing.hpp>
#include <isobath/quant/solver.hpp>
#include <nlohmann/json.hpp>

namespace isobath::formats::compressed_tensors {

using nlohmann::json;

/// A checkpoint directory that lives as long as the test.
class Checkpoint {
 public:
  Checkpoint() {
    static int n_made = 0;
    path_ =
        std::filesystem::temp_directory_path() / fmt::format("isobath_formats_{}_{}", ::getpid(), n_made++);
    std::filesystem::create_directories(path_);
  }
  ~Checkpoint() { std::filesystem::remove_all(path_); }
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  void write_config(const std::string& text) const { std::ofstream(path_ / "config.json") << text; }
  void write_tensors(const io::NamedTensors& tensors) const {
    io::write_safetensors(path_ / "model.safetensors", tensors, {{"format", "pt"}});
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

static std::map<std::string, at::Tensor> by_name(const io::NamedTensors& tensors) {
  return {tensors.begin(), tensors.end()};
}

static json quantization_of(const std::string& config) {
  return json::parse(config).at("quantization_config");
}

/// Golden: modules written by compressed-tensors 0.20.0's own compressor from one 16 × 64 bf16 weight. Its
/// codes are taken as given: it divides in bf16 and so rounds up to a tenth of 8-bit codes to the farther
/// level.
TEST(CompressedTensors, EncodesAndDequantizesTheModulesOfItsOwnCompressorBitForBit) {
  const io::SafetensorsReader golden(ISOBATH_TEST_DATA "/ct_pack_quantized_modules.safetensors");
  const at::Tensor w = golden.read("weight").to(at::kFloat);
  int n_modules = 0;
  for (const auto& [key, info] : golden.tensors()) {
    if (!key.ends_with(".weight_packed")) continue;
    const std::string module = key.substr(0, key.find('.'));
    SCOPED_TRACE(module);
    const bool symmetric = module.find("asym") == std::string::npos;
    int bits = 0, group = 0;
    const char* pattern = symmetric ? "w%d_sym_g%d" : "w%d_asym_g%d";
    ASSERT_EQ(std::sscanf(module.c_str(), pattern, &bits, &group), 2);
    const quant::GridSpec spec{
        .bits = bits, .group = std::max(group, 0), .symmetric = symmetric, .clip_search = false};
    const at::Tensor scale = golden.read(module + ".weight_scale");
    const at::Tensor zero = symmetric ? at::zeros(scale.sizes(), at::kChar)
                                      : unpack_columns(golden.read(module + ".weight_zero_point"), bits, 16);
    const quant::QuantizedMatrix matrix{spec, unpack_rows(golden.read(key), bits, 64), scale, zero};

    const io::NamedTensors encoded = encode(module, matrix);

    EXPECT_EQ(encoded.size(), symmetric ? 3 : 4);
    for (const auto& [name, tensor] : encoded) EXPECT_TRUE(at::equal(tensor, golden.read(name))) << name;
    EXPECT_TRUE(at::equal(quant::dequantize(matrix), golden.read(module + ".dequant")));
    EXPECT_TRUE(at::equal(quant::round_to_nearest(w, {}, spec).scale, scale));
    ++n_modules;
  }
  EXPECT_EQ(n_modules, 9);
}

TEST(CompressedTensors, DecodeReturnsWhatWasEncoded) {
  const at::Tensor w = at::randn({24, 96}, at::detail::createCPUGenerator(5));
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const auto storage : {at::kBFloat16, at::kHalf, at::kFloat}) {
        const quant::GridSpec spec{
            .bits = bits, .group = symmetric ? 32 : 0, .symmetric = symmetric, .storage = storage};
        const quant::QuantizedMatrix matrix = quant::round_to_nearest(w, {}, spec);
        const Checkpoint checkpoint;
        checkpoint.write_tensors(encode("layers.0.up", matrix));
        checkpoint.write_config(config_json("{}", {{"layers.0.up", spec}}, {"lm_head"}, ""));

        const SchemeTable schemes(checkpoint.path());
        const io::ShardedReader reader(checkpoint.path());

        EXPECT_TRUE(at::equal(schemes.decode(reader, "layers.0.up"), quant::dequantize(matrix)));
        EXPECT_FALSE(schemes.decode(reader, "layers.1.up").defined());
      }
    }
  }
}

TEST(CompressedTensors, OneSchemeTargetsLinearAndKeepsTheOriginalConfig) {
  const std::string config =
      config_json(R"({"model_type": "llama", "hidden_size": 64})",
                  {{"a", {.bits = 3, .group = 64}}, {"b", {.bits = 3, .group = 64}}}, {"lm_head"}, "seed 1");

  EXPECT_EQ(json::parse(config).at("hidden_size"), 64);
  const json quantization = quantization_of(config);
  EXPECT_EQ(quantization.at("quant_method"), "compressed-tensors");
  EXPECT_EQ(quantization.at("format"), "pack-quantized");
  EXPECT_EQ(quantization.at("quantization_status"), "compressed");
  EXPECT_EQ(quantization.at("version"), "0.20.0");
  EXPECT_EQ(quantization.at("ignore"), json({"lm_head"}));
  EXPECT_EQ(quantization.at("isobath"), "seed 1");
  ASSERT_EQ(quantization.at("config_groups").size(), 1);
  const json group = quantization.at("config_groups").at("group_0");
  EXPECT_EQ(group.at("targets"), json({"Linear"}));
  EXPECT_EQ(group.at("weights").at("num_bits"), 3);
  EXPECT_EQ(group.at("weights").at("strategy"), "group");
  EXPECT_EQ(group.at("weights").at("group_size"), 64);
}

TEST(CompressedTensors, SeveralSchemesTargetExactNames) {
  const json groups =
      quantization_of(config_json("{}",
                                  {{"a", {.bits = 4}}, {"b", {.bits = 8, .group = 0}}, {"c", {.bits = 4}}},
                                  {"lm_head"}, ""))
          .at("config_groups");

  ASSERT_EQ(groups.size(), 2);
  EXPECT_EQ(groups.at("group_0").at("targets"), json({"a", "c"}));
  EXPECT_EQ(groups.at("group_1").at("targets"), json({"b"}));
  EXPECT_EQ(groups.at("group_1").at("weights").at("strategy"), "channel");
  EXPECT_TRUE(groups.at("group_1").at("weights").at("group_size").is_null());
}

TEST(CompressedTensors, ExactNamesWinOverPatternsAndPatternsOverTheClass) {
  const at::Tensor w = at::randn({16, 64}, at::detail::createCPUGenerator(6));
  const Checkpoint checkpoint;
  io::NamedTensors tensors;
  std::map<std::string, at::Tensor> expected;
  const std::vector<std::pair<std::string, int>> modules{{"m.0.up", 4}, {"m.0.down", 8}, {"m.1.down", 2}};
  for (const auto& [module, bits] : modules) {
    const auto matrix = quant::round_to_nearest(w, {}, {.bits = bits, .group = 16});
    expected[module] = quant::dequantize(matrix);
    for (auto& tensor : encode(module, matrix)) tensors.push_back(std::move(tensor));
  }
  checkpoint.write_tensors(tensors);
  const auto group = [](const std::string& target, int bits) {
    return json{{"targets", {target}},
                {"weights",
                 {{"num_bits", bits},
                  {"type", "int"},
                  {"symmetric", true},
                  {"strategy", "group"},
                  {"group_size", 16}}}};
  };
  json config;
  config["quantization_config"] = {
      {"quant_method", "compressed-tensors"},
      {"format", "pack-quantized"},
      {"ignore", {"lm_head"}},
      {"config_groups",
       {{"g0", group("Linear", 4)}, {"g1", group("re:.*down", 8)}, {"g2", group("m.1.down", 2)}}}};
  checkpoint.write_config(config.dump());

  const SchemeTable schemes(checkpoint.path());
  const io::ShardedReader reader(checkpoint.path());

  for (const auto& [module, bits] : modules) {
    EXPECT_TRUE(at::equal(schemes.decode(reader, module), expected.at(module))) << module;
  }
}

TEST(CompressedTensors, PlainCheckpointsHaveAnEmptyTable) {
  const Checkpoint checkpoint;
  checkpoint.write_config(R"({"model_type": "llama"})");
  EXPECT_TRUE(SchemeTable(checkpoint.path()).empty());
}

TEST(CompressedTensors, OtherMethodsAndFormatsAreRefusedByName) {
  for (const std::string text :
       {R"({"quant_method": "gptq", "bits": 4})",
        R"({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})"}) {
    const Checkpoint checkpoint;
    checkpoint.write_config("{\"quantization_config\": " + text + "}");
    try {
      const SchemeTable schemes(checkpoint.path());
      FAIL() << "expected DataError for " << text;
    } catch (const DataError& error) {
      EXPECT_NE(std::string(error.what()).find("supported: "), std::string::npos) << error.what();
    }
  }
}

TEST(CompressedTensors, TensorsThatContradictTheSchemeAreDataErrors) {
  const quant::GridSpec spec{.bits = 4, .group = 32};
  const auto matrix = quant::round_to_nearest(at::ones({16, 64}), {}, spec);
  for (const std::string damaged : {"m.weight_packed", "m.weight_scale", "m.weight_shape"}) {
    auto tensors = by_name(encode("m", matrix));
    tensors.at(damaged) = tensors.at(damaged).narrow(0, 0, 1).contiguous();
    const Checkpoint checkpoint;
    checkpoint.write_tensors({tensors.begin(), tensors.end()});
    checkpoint.write_config(config_json("{}", {{"m", spec}}, {}, ""));
    const SchemeTable schemes(checkpoint.path());
    const io::ShardedReader reader(checkpoint.path());
    EXPECT_THROW((void)schemes.decode(reader, "m"), DataError) << damaged;
  }
}

}  // namespace isobath::formats::compressed_tensors
