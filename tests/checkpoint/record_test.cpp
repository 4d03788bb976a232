#include "record.hpp"

#include <gtest/gtest.h>

#include <isobath/core/error.hpp>

namespace isobath::checkpoint {
namespace {

Manifest example() {
  Manifest manifest{17, {{"quantization.bits", "3"}, {"model", "a \"quoted\" näme"}}, {}, {}, {}};
  manifest.rank_files = {{"rank-0000.h5", 2048, std::string(32, 'a'), {"x", "y/z"}},
                         {"rank-0001.h5", 0, std::string(32, 'b'), {}}};
  manifest.state = {"state.bin", 99, std::string(32, 'c'), {}};
  manifest.outputs["s/a.safetensors"] = {"s/a.safetensors", 5, std::string(32, 'd'), {}};
  return manifest;
}

TEST(Record, AManifestSurvivesTheRoundTrip) {
  const Manifest read = Manifest::from_text(example().to_text(), "test");

  EXPECT_EQ(read.number, 17);
  EXPECT_EQ(read.fingerprint, example().fingerprint);
  ASSERT_EQ(read.rank_files.size(), 2u);
  EXPECT_EQ(read.rank_files[0].datasets, (std::vector<std::string>{"x", "y/z"}));
  EXPECT_EQ(read.rank_files[0].bytes, 2048);
  EXPECT_EQ(read.state.digest, std::string(32, 'c'));
  EXPECT_EQ(read.outputs.at("s/a.safetensors").digest, std::string(32, 'd'));
  EXPECT_TRUE(Json::accept(example().to_text()));
}

TEST(Record, EveryFlippedBitOfAManifestIsDetected) {
  const std::string text = example().to_text();
  for (size_t position = 0; position < text.size(); ++position) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = text;
      damaged[position] = static_cast<char>(damaged[position] ^ (1 << bit));
      EXPECT_THROW(static_cast<void>(Manifest::from_text(damaged, "test")), CheckpointError)
          << position << " " << bit;
    }
  }
}

TEST(Record, EveryTruncationOfAManifestIsDetected) {
  const std::string text = example().to_text();
  for (size_t length = 0; length < text.size(); ++length) {
    EXPECT_THROW(static_cast<void>(unseal(text.substr(0, length), "test")), CheckpointError) << length;
  }
  EXPECT_THROW(static_cast<void>(unseal(text + "\n", "test")), CheckpointError);
}

TEST(Record, AManifestOfAnotherVersionNamesBothVersions) {
  try {
    static_cast<void>(Manifest::from_text(seal(Json{{"version", 9}}), "m.json"));
    FAIL() << "accepted";
  } catch (const CheckpointError& error) {
    EXPECT_NE(std::string(error.what()).find("m.json has format version 9, this isobath reads version 1"),
              std::string::npos)
        << error.what();
  }
}

TEST(Record, FilesOutsideTheirDirectoryAreRefused) {
  for (const std::string name : {"", "/etc/passwd", "../x", "a/../../x"}) {
    EXPECT_THROW(static_cast<void>(FileRecord::from_json(Json{{"name", name}, {"bytes", 1}, {"xxh3", ""}})),
                 CheckpointError)
        << name;
  }
}

TEST(Record, DifferencesNameEachFieldWithBothValues) {
  EXPECT_EQ(differences({{"a", "1"}, {"b", "2"}, {"c", "3"}}, {{"a", "1"}, {"b", "5"}, {"d", "4"}}),
            "b: 2 in the run, 5 now\n  c: 3 in the run, absent now\n  d: absent in the run, 4 now");
  EXPECT_EQ(differences({{"a", "1"}}, {{"a", "1"}}), "");
}

TEST(Record, ATextThatIsNotUtf8IsAnErrorNotACrash) {
  EXPECT_THROW(static_cast<void>(seal(Json{{"path", "\xff\xfe"}})), ConfigError);
}

}  // namespace
}  // namespace isobath::checkpoint
