#include <gtest/gtest.h>

#include <ATen/ATen.h>
#include <unistd.h>

#include <fstream>
#include <isobath/core/digest.hpp>
#include <isobath/core/error.hpp>

namespace isobath {
namespace {

std::string digest_of(const at::Tensor& tensor) {
  return Digest().update(tensor).hex();
}

class FileDigestTest : public ::testing::Test {
 protected:
  FileDigestTest()
      : path_(std::filesystem::temp_directory_path() / fmt::format("isobath_digest_{}", ::getpid())) {}
  ~FileDigestTest() override { std::filesystem::remove(path_); }
  void write(const std::string& bytes) const { std::ofstream(path_, std::ios::binary) << bytes; }
  std::filesystem::path path_;
};

TEST(Digest, GivesTheKnownAnswerOfTheEmptyInput) {
  EXPECT_EQ(Digest().hex(),
            "99aa06d3014798d86001c324468d497f");  // length 0, seed 0 of the test vectors of xxHash
}

TEST(Digest, DoesNotDependOnHowTheInputIsCut) {
  const std::string text(1000, 'q');
  Digest pieces;
  for (size_t i = 0; i < text.size(); i += 7) pieces.update(text.substr(i, 7));
  EXPECT_EQ(pieces.hex(), Digest().update(text).hex());
  EXPECT_NE(pieces.hex(), Digest().update(text + "q").hex());
}

TEST(Digest, SeesValuesShapeAndDtypeOfATensor) {
  const at::Tensor values = at::arange(6, at::kFloat);
  EXPECT_EQ(digest_of(values), digest_of(values.clone()));
  EXPECT_NE(digest_of(values), digest_of(values + 1));
  EXPECT_NE(digest_of(values.reshape({2, 3})), digest_of(values.reshape({3, 2})));
  EXPECT_NE(digest_of(at::zeros({4}, at::kFloat)), digest_of(at::zeros({4}, at::kInt)));
  EXPECT_NE(digest_of(at::zeros({1})), digest_of(-at::zeros({1})));  // bits, not values
}

TEST(Digest, DoesNotSeeTheLayoutOfATensor) {
  const at::Tensor values = at::arange(6, at::kFloat).reshape({2, 3});
  EXPECT_EQ(digest_of(values.t()), digest_of(values.t().contiguous()));
}

TEST_F(FileDigestTest, IsTheDigestOfTheBytes) {
  const std::string longer_than_one_piece((8u << 20) + 5, 'z');
  write(longer_than_one_piece);
  EXPECT_EQ(file_digest(path_), Digest().update(longer_than_one_piece).hex());
}

TEST_F(FileDigestTest, Sha256GivesTheKnownAnswer) {
  write("abc");  // FIPS 180-4, example 1
  EXPECT_EQ(file_sha256(path_), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_F(FileDigestTest, AMissingFileIsAnIoErrorThatNamesIt) {
  try {
    static_cast<void>(file_digest("/nonexistent/file"));
    FAIL() << "no error";
  } catch (const IoError& error) {
    EXPECT_NE(std::string(error.what()).find("/nonexistent/file"), std::string::npos);
  }
  EXPECT_THROW(static_cast<void>(file_sha256("/nonexistent/file")), IoError);
}

}  // namespace
}  // namespace isobath
