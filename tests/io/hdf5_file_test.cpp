#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <chrono>
#include <isobath/core/error.hpp>
#include <isobath/io/hdf5_file.hpp>
#include <limits>
#include <thread>

#include "io/temporary_directory.hpp"

namespace isobath::io {
namespace {

using test::message_of;
using test::TemporaryDirectory;

void write_sample(const std::filesystem::path& path) {
  Hdf5Writer writer(path);
  writer.write("a/b/f32", at::arange(12, at::kFloat).reshape({3, 4}));
  writer.write("a/f64", at::arange(3, at::kDouble));
  writer.write("i8", at::arange(-3, 3, at::kChar));
  writer.write("u8", at::arange(5, at::kByte));
  writer.write("i32", at::arange(5, at::kInt));
  writer.write("i64", at::arange(5, at::kLong));
  writer.write("bf16", at::arange(5, at::kBFloat16));
  writer.write("scalar", at::full({}, 7, at::kInt));
  writer.write("empty", at::empty({0, 4}, at::kFloat));
  writer.attribute("", "integer", std::numeric_limits<int64_t>::min());
  writer.attribute("/", "real", 0.1);
  writer.attribute("a/b", "text", std::string("a \"ü\" text"));
  writer.attribute("a/b/f32", "no_text", std::string());
  writer.attribute("i8", "texts", std::vector<std::string>{"long one", "", "x"});
  writer.attribute("i8", "no_texts", std::vector<std::string>{});
  writer.commit();
}

TEST(Hdf5File, EveryDtypeShapeAndAttributeReadsBack) {
  const TemporaryDirectory directory;
  write_sample(directory / "f.h5");
  EXPECT_EQ(directory.names(), std::set<std::string>{"f.h5"});
  const Hdf5Reader reader(directory / "f.h5");
  EXPECT_TRUE(at::equal(reader.read("a/b/f32"), at::arange(12, at::kFloat).reshape({3, 4})));
  EXPECT_TRUE(at::equal(reader.read("/a/f64"), at::arange(3, at::kDouble)));
  EXPECT_TRUE(at::equal(reader.read("i8"), at::arange(-3, 3, at::kChar)));
  EXPECT_TRUE(at::equal(reader.read("u8"), at::arange(5, at::kByte)));
  EXPECT_TRUE(at::equal(reader.read("i32"), at::arange(5, at::kInt)));
  EXPECT_TRUE(at::equal(reader.read("i64"), at::arange(5, at::kLong)));
  EXPECT_EQ(reader.read("bf16").scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::equal(reader.read("bf16"), at::arange(5, at::kBFloat16)));
  EXPECT_EQ(reader.read("scalar").dim(), 0);
  EXPECT_EQ(reader.read("scalar").item<int>(), 7);
  EXPECT_EQ(reader.read("empty").sizes(), (at::IntArrayRef{0, 4}));
  EXPECT_EQ(reader.shape("empty"), (std::vector<int64_t>{0, 4}));
  EXPECT_EQ(reader.attribute("/", "integer"), Attribute(std::numeric_limits<int64_t>::min()));
  EXPECT_EQ(reader.attribute("", "real"), Attribute(0.1));
  EXPECT_EQ(reader.attribute("a/b", "text"), Attribute(std::string("a \"ü\" text")));
  EXPECT_EQ(reader.attribute("a/b/f32", "no_text"), Attribute(std::string()));
  EXPECT_EQ(reader.attribute("i8", "texts"), Attribute(std::vector<std::string>{"long one", "", "x"}));
  EXPECT_EQ(reader.attribute("i8", "no_texts"), Attribute(std::vector<std::string>{}));
}

TEST(Hdf5File, MembersAndPresenceAreTold) {
  const TemporaryDirectory directory;
  write_sample(directory / "f.h5");
  const Hdf5Reader reader(directory / "f.h5");
  EXPECT_EQ(reader.members("a"), (std::vector<std::string>{"b", "f64"}));
  EXPECT_EQ(reader.members("").size(), 8u);
  EXPECT_TRUE(reader.contains("a/b/f32"));
  EXPECT_TRUE(reader.contains("/"));
  EXPECT_FALSE(reader.contains("a/x/f32"));
  EXPECT_TRUE(reader.has_attribute("i8", "texts"));
  EXPECT_FALSE(reader.has_attribute("i8", "absent"));
  EXPECT_FALSE(reader.has_attribute("absent", "texts"));
}

TEST(Hdf5File, RowsAreRead) {
  const TemporaryDirectory directory;
  write_sample(directory / "f.h5");
  const Hdf5Reader reader(directory / "f.h5");
  EXPECT_TRUE(at::equal(reader.read_rows("a/b/f32", 1, 3), at::arange(4, 12, at::kFloat).reshape({2, 4})));
  EXPECT_TRUE(at::equal(reader.read_rows("bf16", 4, 5), at::full({1}, 4, at::kBFloat16)));
  EXPECT_EQ(reader.read_rows("i32", 2, 2).numel(), 0);
  EXPECT_THROW(static_cast<void>(reader.read_rows("i32", 0, 6)), InternalError);
}

TEST(Hdf5File, EqualContentGivesEqualBytesAtAnyTime) {
  const TemporaryDirectory directory;
  write_sample(directory / "a.h5");
  // HDF5 time stamps count whole seconds.
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));
  write_sample(directory / "b.h5");
  EXPECT_EQ(test::read_bytes(directory / "a.h5"), test::read_bytes(directory / "b.h5"));
}

TEST(Hdf5File, StridedTensorsAreStoredInCOrder) {
  const TemporaryDirectory directory;
  const at::Tensor tensor = at::arange(6, at::kFloat).reshape({2, 3}).t();
  Hdf5Writer writer(directory / "f.h5");
  writer.write("t", tensor);
  writer.commit();
  EXPECT_TRUE(at::equal(Hdf5Reader(directory / "f.h5").read("t"), tensor));
}

TEST(Hdf5File, WithoutCommitTheOldFileStaysAndNothingElse) {
  const TemporaryDirectory directory;
  test::write_bytes(directory / "f.h5", "old");
  { Hdf5Writer(directory / "f.h5").write("t", at::zeros({3})); }
  EXPECT_EQ(test::read_bytes(directory / "f.h5"), "old");
  EXPECT_EQ(directory.names(), std::set<std::string>{"f.h5"});
}

TEST(Hdf5File, CommitNoticesBytesThatChangedOnTheDisk) {
  const TemporaryDirectory directory;
  const at::Tensor marked = at::full({1000}, 0x51525354, at::kInt);
  Hdf5Writer writer(directory / "f.h5");
  writer.write("t", marked);
  // A disk that loses a write: one byte changes behind the library's back. Closing the dataset has put it in
  // the file.
  std::string bytes = test::read_bytes(directory / "f.h5.tmp");
  const size_t at = bytes.find("TSRQTSRQ");
  ASSERT_NE(at, std::string::npos);
  {
    std::fstream file(directory / "f.h5.tmp", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(at));
    file.put('X');
  }
  const std::string message = message_of<IoError>([&] { writer.commit(); });
  EXPECT_NE(message.find("dataset t does not read back"), std::string::npos) << message;
  EXPECT_TRUE(directory.names().empty());
  EXPECT_THROW(writer.commit(), IoError);
}

TEST(Hdf5File, ContractViolationsAreOurDefects) {
  const TemporaryDirectory directory;
  Hdf5Writer writer(directory / "f.h5");
  writer.write("t", at::zeros({3}));
  EXPECT_THROW(writer.write("t", at::zeros({3})), InternalError);
  EXPECT_THROW(writer.write("half", at::zeros({3}, at::kHalf)), InternalError);
  EXPECT_THROW(writer.attribute("t", "a", std::string("nul\0", 4)), InternalError);
  writer.commit();
  EXPECT_THROW(writer.write("u", at::zeros({3})), InternalError);
}

TEST(Hdf5File, ReadersReportWhatIsMissingOrForeign) {
  const TemporaryDirectory directory;
  write_sample(directory / "f.h5");
  const Hdf5Reader reader(directory / "f.h5");
  EXPECT_NE(message_of<DataError>([&] { static_cast<void>(reader.read("absent")); }).find("no object absent"),
            std::string::npos);
  EXPECT_NE(message_of<DataError>([&] { static_cast<void>(reader.read("a")); }).find("not a dataset"),
            std::string::npos);
  EXPECT_NE(
      message_of<DataError>([&] { static_cast<void>(reader.attribute("a", "x")); }).find("no attribute x"),
      std::string::npos);
  EXPECT_THROW(Hdf5Reader(directory / "absent.h5"), IoError);
  test::write_bytes(directory / "text.h5", "not HDF5 at all");
  EXPECT_NE(message_of<DataError>([&] { Hdf5Reader(directory / "text.h5"); }).find("not an HDF5 file"),
            std::string::npos);
}

TEST(Hdf5File, ATruncatedFileIsADataError) {
  const TemporaryDirectory directory;
  write_sample(directory / "f.h5");
  std::filesystem::resize_file(directory / "f.h5", std::filesystem::file_size(directory / "f.h5") / 2);
  EXPECT_THROW(Hdf5Reader(directory / "f.h5"), DataError);
}

TEST(Hdf5File, AMissingDirectoryIsAnIoErrorWithTheReason) {
  const std::string message = message_of<IoError>([] { Hdf5Writer("/nonexistent/f.h5"); });
  EXPECT_NE(message.find("No such file"), std::string::npos) << message;
}

}  // namespace
}  // namespace isobath::io
