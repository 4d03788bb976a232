#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>
#include <isobath/core/error.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <isobath/io/safetensors_writer.hpp>

#include "io/temporary_directory.hpp"

namespace isobath::io {
namespace {

using test::message_of;
using test::TemporaryDirectory;

/// One tensor of every dtype; the bytes count up, so that a swap of any two shows.
NamedTensors every_dtype() {
  NamedTensors tensors;
  for (const at::ScalarType dtype :
       {at::kByte, at::kChar, at::kShort, at::kInt, at::kLong, at::kHalf, at::kBFloat16, at::kFloat,
        at::kDouble, at::kFloat8_e4m3fn, at::kFloat8_e5m2, at::kUInt16, at::kUInt32, at::kUInt64}) {
    const auto size = static_cast<int64_t>(c10::elementSize(dtype));
    const at::Tensor bytes = at::arange(3 * 2 * size, at::kByte).reshape({3, 2 * size});
    tensors.emplace_back(std::string("t.") + c10::toString(dtype), bytes.view(dtype));
  }
  tensors.emplace_back("bool", at::tensor({1, 0, 1}, at::kByte).to(at::kBool));
  return tensors;
}

bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return x.scalar_type() == y.scalar_type() && x.sizes() == y.sizes() &&
         std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

TEST(SafetensorsFile, EveryDtypeReadsBackAsWritten) {
  const TemporaryDirectory directory;
  const NamedTensors tensors = every_dtype();
  write_safetensors(directory / "f", tensors, {{"format", "pt"}, {"note", "a \"quoted\" ü"}});
  const SafetensorsReader reader(directory / "f");
  ASSERT_EQ(reader.tensors().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(same_bytes(reader.read(name), tensor)) << name;
  EXPECT_EQ(reader.metadata(),
            (std::map<std::string, std::string>{{"format", "pt"}, {"note", "a \"quoted\" ü"}}));
  EXPECT_EQ(directory.names(), std::set<std::string>{"f"});
}

TEST(SafetensorsFile, RankZeroAndEmptyTensorsReadBack) {
  const TemporaryDirectory directory;
  write_safetensors(directory / "f", {{"scalar", at::full({}, 2.5)}, {"empty", at::empty({0, 3})}}, {});
  const SafetensorsReader reader(directory / "f");
  EXPECT_EQ(reader.read("scalar").dim(), 0);
  EXPECT_EQ(reader.read("scalar").item<double>(), 2.5);
  EXPECT_EQ(reader.read("empty").sizes(), (at::IntArrayRef{0, 3}));
  EXPECT_EQ(reader.read_rows("empty", 0, 0).sizes(), (at::IntArrayRef{0, 3}));
}

TEST(SafetensorsFile, BytesDependOnContentOnly) {
  const TemporaryDirectory directory;
  NamedTensors tensors = every_dtype();
  write_safetensors(directory / "a", tensors, {{"k", "v"}, {"a", "b"}});
  std::reverse(tensors.begin(), tensors.end());
  for (auto& [name, tensor] : tensors) {
    if (tensor.dim() == 2) tensor = tensor.t().contiguous().t();
  }
  write_safetensors(directory / "b", tensors, {{"a", "b"}, {"k", "v"}});
  EXPECT_EQ(test::read_bytes(directory / "a"), test::read_bytes(directory / "b"));
}

TEST(SafetensorsFile, HeaderIsLaidOutByDtypeThenNameAndPadded) {
  const TemporaryDirectory directory;
  write_safetensors(directory / "f",
                    {{"b", at::zeros({2}, at::kFloat)},
                     {"z", at::zeros({1}, at::kLong)},
                     {"a", at::zeros({1}, at::kFloat)}},
                    {{"format", "pt"}});
  const std::string header = R"({"__metadata__":{"format":"pt"},)"
                             R"("z":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                             R"("a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]},)"
                             R"("b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}})";
  const size_t length = (header.size() + 7) / 8 * 8;
  const std::string bytes = test::read_bytes(directory / "f");
  EXPECT_EQ(bytes.substr(8, length), header + std::string(length - header.size(), ' '));
  EXPECT_EQ(bytes.size(), 8 + length + 20);
}

TEST(SafetensorsFile, RowsAreRead) {
  const TemporaryDirectory directory;
  const at::Tensor tensor = at::arange(5 * 6, at::kFloat).reshape({5, 2, 3});
  write_safetensors(directory / "f", {{"t", tensor}, {"u", tensor + 100}}, {});
  const SafetensorsReader reader(directory / "f");
  EXPECT_TRUE(at::equal(reader.read_rows("u", 1, 4), (tensor + 100).slice(0, 1, 4)));
  EXPECT_EQ(reader.read_rows("t", 5, 5).size(0), 0);
  EXPECT_THROW(static_cast<void>(reader.read_rows("t", 3, 6)), InternalError);
  EXPECT_THROW(static_cast<void>(reader.info("absent")), DataError);
}

TEST(SafetensorsFile, TensorsAreAligned) {
  const TemporaryDirectory directory;
  write_safetensors(directory / "f", {{"odd", at::zeros({3}, at::kByte)}, {"t", at::zeros({7}, at::kFloat)}},
                    {});
  const SafetensorsReader reader(directory / "f");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(reader.read("t").const_data_ptr()) % 64, 0u);
}

TEST(SafetensorsFile, AFileThatShrinksAfterOpeningIsAnErrorNotASignal) {
  const TemporaryDirectory directory;
  write_safetensors(directory / "f", {{"t", at::zeros({1000})}}, {});
  const SafetensorsReader reader(directory / "f");
  std::filesystem::resize_file(directory / "f", 200);
  EXPECT_NE(message_of<DataError>([&] { static_cast<void>(reader.read("t")); }).find("changed while"),
            std::string::npos);
}

TEST(SafetensorsFile, ABoolOfAnotherByteIsRefused) {
  const TemporaryDirectory directory;
  write_safetensors(directory / "f", {{"flag", at::zeros({2}, at::kBool)}}, {});
  std::string bytes = test::read_bytes(directory / "f");
  bytes.back() = 2;
  test::write_bytes(directory / "f", bytes);
  EXPECT_NE(message_of<DataError>([&] {
              static_cast<void>(SafetensorsReader(directory / "f").read("flag"));
            }).find("expected 0 or 1"),
            std::string::npos);
}

TEST(SafetensorsFile, TheWriterRefusesWhatAReaderWouldRefuse) {
  const TemporaryDirectory directory;
  const at::Tensor tensor = at::zeros({1});
  EXPECT_THROW(write_safetensors(directory / "f", {{"a", tensor}, {"a", tensor}}, {}), InternalError);
  EXPECT_THROW(write_safetensors(directory / "f", {{"", tensor}}, {}), InternalError);
  EXPECT_THROW(write_safetensors(directory / "f", {{"__metadata__", tensor}}, {}), InternalError);
  EXPECT_THROW(write_safetensors(directory / "f", {{"a\x1b", tensor}}, {}), InternalError);
  EXPECT_THROW(write_safetensors(directory / "f", {{"c", at::zeros({1}, at::kComplexFloat)}}, {}),
               InternalError);
  EXPECT_TRUE(directory.names().empty());
}

TEST(SafetensorsFile, AMissingDirectoryIsAnIoError) {
  EXPECT_NE(message_of<IoError>([] {
              write_safetensors("/nonexistent/f", {{"a", at::zeros({1})}}, {});
            }).find("/nonexistent"),
            std::string::npos);
}

TEST(ShardFileName, CountsFromOneInFiveDigits) {
  EXPECT_EQ(shard_file_name(3, 32), "model-00003-of-00032.safetensors");
  EXPECT_THROW(static_cast<void>(shard_file_name(0, 1)), InternalError);
}

class ShardedCheckpoint : public ::testing::Test {
 protected:
  ShardedCheckpoint() {
    write_safetensors(directory_ / "one.safetensors", {{"a", at::full({2}, 1.0F)}}, {});
    write_safetensors(directory_ / "two.safetensors", {{"b", at::full({3}, 2.0F)}, {"c", at::zeros({1})}},
                      {});
    index(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"}})");
  }
  void index(const std::string& text) const {
    test::write_bytes(directory_ / "model.safetensors.index.json", text);
  }
  /// The message of the DataError that opening gives, "" when it opens.
  [[nodiscard]] std::string open() const {
    try {
      ShardedReader reader(directory_.path());
    } catch (const DataError& error) {
      return error.what();
    }
    return {};
  }
  void expect_refused(const std::string& index_text, std::initializer_list<const char*> parts) const {
    index(index_text);
    const std::string message = open();
    for (const char* part : parts)
      EXPECT_NE(message.find(part), std::string::npos) << part << " in: " << message;
  }

  TemporaryDirectory directory_;
};

TEST_F(ShardedCheckpoint, TensorsComeFromTheirShards) {
  const ShardedReader reader(directory_.path());
  EXPECT_EQ(reader.names(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(reader.shard_of("b"), "two.safetensors");
  EXPECT_TRUE(at::equal(reader.read("b"), at::full({3}, 2.0F)));
  EXPECT_TRUE(at::equal(reader.read_rows("b", 1, 2), at::full({1}, 2.0F)));
  EXPECT_EQ(reader.info("a").shape, std::vector<int64_t>{2});
  EXPECT_FALSE(reader.contains("d"));
  EXPECT_THROW(static_cast<void>(reader.read("d")), DataError);
}

TEST_F(ShardedCheckpoint, FingerprintChangesWithAHeaderAndNotWithTheIndexText) {
  const std::string before = ShardedReader(directory_.path()).fingerprint();
  index(R"({"metadata":{"total_size":24},)"
        R"("weight_map":{"c":"two.safetensors","b":"two.safetensors","a":"one.safetensors"}})");
  EXPECT_EQ(ShardedReader(directory_.path()).fingerprint(), before);
  write_safetensors(directory_ / "one.safetensors", {{"a", at::full({1, 2}, 1.0F)}}, {});
  EXPECT_NE(ShardedReader(directory_.path()).fingerprint(), before);
}

TEST_F(ShardedCheckpoint, FingerprintChangesWithTheWeightsAlone) {
  const std::string before = ShardedReader(directory_.path()).fingerprint();
  write_safetensors(directory_ / "one.safetensors", {{"a", at::full({2}, 3.0F)}}, {});
  EXPECT_NE(ShardedReader(directory_.path()).fingerprint(), before);
}

TEST_F(ShardedCheckpoint, ASingleFileNeedsNoIndex) {
  write_safetensors(directory_ / "model.safetensors", {{"x", at::zeros({1})}}, {});
  EXPECT_EQ(ShardedReader(directory_.path()).names(), std::vector<std::string>{"x"});
}

TEST_F(ShardedCheckpoint, AMissingTruncatedOrMalformedShardIsNamedWithItsTensor) {
  std::filesystem::resize_file(directory_ / "two.safetensors",
                               std::filesystem::file_size(directory_ / "two.safetensors") - 1);
  EXPECT_NE(open().find("two.safetensors\" of tensor \"b\""), std::string::npos) << open();
  EXPECT_NE(open().find("truncated"), std::string::npos) << open();
  std::filesystem::remove(directory_ / "two.safetensors");
  EXPECT_NE(open().find("No such file"), std::string::npos) << open();
}

TEST_F(ShardedCheckpoint, AnIndexThatDisagreesWithTheShardsIsRefused) {
  expect_refused(R"({"weight_map":{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"}})",
                 {"\"b\"", "one.safetensors", "not in its shard"});
  expect_refused(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})",
                 {"\"c\"", "two.safetensors", "not in weight_map"});
  write_safetensors(directory_ / "one.safetensors", {{"a", at::zeros({1})}, {"b", at::zeros({3})}}, {});
  expect_refused(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"}})",
                 {"\"b\"", "in two shards", "one.safetensors", "two.safetensors"});
}

TEST_F(ShardedCheckpoint, AMaliciousIndexIsRefused) {
  expect_refused(R"({"weight_map":{"a":"../one.safetensors"}})", {"\"a\"", "not a plain file name"});
  expect_refused(R"({"weight_map":{"a":"/etc/passwd"}})", {"not a plain file name"});
  expect_refused(R"({"weight_map":{"a":".."}})", {"not a plain file name"});
  expect_refused(R"({"weight_map":{"a":""}})", {"not a plain file name"});
  expect_refused(R"({"weight_map":{"a":"one\u0000.safetensors"}})", {"not a plain file name"});
  expect_refused(R"({"weight_map":{"a":7}})", {"not a plain file name"});
  expect_refused(R"({"weight_map":{"a\u001b":"one.safetensors"}})", {"control character"});
  expect_refused(R"({"weight_map":{"a":"one.safetensors","a":"two.safetensors"}})", {"duplicate key \"a\""});
  expect_refused(R"({"weight_map":{"a":"one.safetensors"},"weight_map":{}})",
                 {"duplicate key \"weight_map\""});
  expect_refused(R"({"weight_map":{}})", {"at least one tensor"});
  expect_refused(R"([])", {"expected an object weight_map"});
  expect_refused(R"({"weight_map":)", {"not valid UTF-8 JSON"});
  expect_refused("{\"x\":" + std::string(100'000, '['), {"nested more than"});
  expect_refused(std::string("{}\0x", 4), {"NUL"});
}

TEST(ShardedReader, AnEmptyDirectorySaysWhatIsExpected) {
  const TemporaryDirectory directory;
  EXPECT_NE(message_of<DataError>([&] {
              ShardedReader reader(directory.path());
            }).find("model.safetensors.index.json"),
            std::string::npos);
}

}  // namespace
}  // namespace isobath::io
