#include <gtest/gtest.h>

#include <fstream>
#include <isobath/config/schema.hpp>
#include <nlohmann/json.hpp>
#include <sstream>

#include "minimal.hpp"

namespace isobath::config {
namespace {

std::string file_text(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(std::string(ISOBATH_SOURCE_ROOT) + "/" + path).rdbuf();
  return text.str();
}

TEST(ConfigSchema, TheCommittedFileIsWhatTheTableSays) {
  EXPECT_TRUE(file_text("configs/schema.json") == json_schema())
      << "rewrite it with `isobath check --schema`";
}

TEST(ConfigSchema, TheDocumentationHoldsTheTableAsItIs) {
  EXPECT_NE(file_text("docs/configuration.md").find(keys_markdown()), std::string::npos)
      << "paste the output of `isobath check --keys`";
  for (const KeyInfo& key : all_keys()) EXPECT_TRUE(key.description.ends_with(".")) << key.key;
}

TEST(ConfigSchema, DefaultTextsReadBackAsTheDefaults) {
  const auto defaults = parse(kMinimal, {}, "run.yaml").flatten();
  std::vector<std::string> settings;
  for (const KeyInfo& key : all_keys()) {
    EXPECT_TRUE(!key.default_text.empty() || key.type == "text") << key.key;
    if (!key.is_required) settings.push_back(key.key + "=" + key.default_text);
  }

  EXPECT_EQ(parse(kMinimal, settings, "run.yaml").flatten(), defaults);
}

TEST(ConfigSchema, EverySchemaLeafHasADefaultOrIsRequired) {
  const auto schema = nlohmann::json::parse(json_schema());

  EXPECT_EQ(schema["required"], nlohmann::json({"model", "output", "calibration"}));
  EXPECT_EQ(schema["properties"]["calibration"]["required"], nlohmann::json({"tokens"}));
  EXPECT_EQ(schema["properties"]["quantization"]["properties"]["bits"]["default"], 3);
  EXPECT_EQ(
      schema["properties"]["quantization"]["properties"]["reestimate"]["properties"]["policy"]["default"],
      "never");
  EXPECT_EQ(schema["properties"]["quantization"]["additionalProperties"], false);
  EXPECT_EQ(schema["properties"]["ranks"]["properties"]["stages"]["default"], "auto");
}

TEST(NearestKey, FindsWhatIsFewEditsAwayAndNothingElse) {
  const std::vector<std::string> known{"quantization.bits", "quantization.group", "sensitivity.loss"};

  EXPECT_EQ(nearest_key("quantisation.bits", known), "quantization.bits");
  EXPECT_EQ(nearest_key("quantization.gorup", known), "quantization.group");
  EXPECT_EQ(nearest_key("model.loss", known), "sensitivity.loss");
  EXPECT_EQ(nearest_key("zebra", known), "");
  EXPECT_EQ(nearest_key("", known), "");
}

}  // namespace
}  // namespace isobath::config
