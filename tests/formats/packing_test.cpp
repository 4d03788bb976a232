#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/formats/packing.hpp>
#include <nlohmann/json.hpp>

namespace isobath::formats {

TEST(Packing, FourBitsFillAWordFromTheLowEnd) {
  const at::Tensor codes = at::tensor({-8, 7, -5, 1, -3, -3, -7, -1}, at::kChar).view({1, 8});
  EXPECT_EQ(static_cast<uint32_t>(pack_rows(codes, 4).item<int32_t>()), 0x715593f0U);
}

/// Golden: words made by compressed-tensors 0.20.0 `pack_to_int32`, bits 1 to 8 along both dimensions.
TEST(Packing, EqualsCompressedTensorsWordForWordAndInverts) {
  std::ifstream stream(ISOBATH_TEST_DATA "/ct_pack_to_int32.json");
  const auto golden = nlohmann::json::parse(stream);
  int n_cases = 0;
  for (const auto& entry : golden.at("cases")) {
    const int bits = entry.at("num_bits").get<int>();
    const bool along_rows = entry.at("packed_dim").get<int>() == 1;
    const auto shape = entry.at("shape").get<std::vector<int64_t>>();
    SCOPED_TRACE(fmt::format("{} bits, along {}, {} x {}", bits, along_rows, shape[0], shape[1]));
    std::vector<int8_t> values;
    for (const auto& row : entry.at("values")) values.insert(values.end(), row.begin(), row.end());
    std::vector<int32_t> words;
    for (const auto& word : entry.at("packed_hex")) {
      words.push_back(
          static_cast<int32_t>(static_cast<uint32_t>(std::stoul(word.get<std::string>(), nullptr, 16))));
    }
    const at::Tensor codes = at::tensor(at::ArrayRef<int8_t>(values), at::kChar).view(shape);
    const at::Tensor expected = at::tensor(at::ArrayRef<int32_t>(words), at::kInt)
                                    .view(entry.at("packed_shape").get<std::vector<int64_t>>());

    EXPECT_TRUE(at::equal(along_rows ? pack_rows(codes, bits) : pack_columns(codes, bits), expected));
    EXPECT_TRUE(at::equal(
        along_rows ? unpack_rows(expected, bits, shape[1]) : unpack_columns(expected, bits, shape[0]),
        codes));
    ++n_cases;
  }
  EXPECT_GE(n_cases, 16);
}

TEST(Packing, ThreeBitWordsOfTheOldLayoutAreADataError) {
  EXPECT_THROW((void)unpack_rows(at::zeros({2, 13}, at::kInt), 3, 128), DataError);
}

}  // namespace isobath::formats
