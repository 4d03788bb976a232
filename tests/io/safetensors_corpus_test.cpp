// Malformed files, each for one rule of the format (docs/formats.md); none may be accepted, crash, or cost
// memory.
#include <gtest/gtest.h>

#include <bit>
#include <isobath/core/error.hpp>
#include <isobath/io/safetensors_reader.hpp>

#include "io/temporary_directory.hpp"

namespace isobath::io {
namespace {

std::string little_endian(uint64_t value) {
  std::string bytes(8, '\0');
  for (size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>(value >> (8 * i) & 0xFF);
  return bytes;
}

std::string file_of(const std::string& header, size_t data_bytes) {
  return little_endian(header.size()) + header + std::string(data_bytes, '\0');
}

std::string repeat(const std::string& text, size_t count) {
  std::string all;
  for (size_t i = 0; i < count; ++i) all += text;
  return all;
}

/// A tensor entry `"name":{…}` of an F32 vector.
std::string entry(const std::string& name, const std::string& shape, const std::string& offsets,
                  const std::string& dtype = "F32") {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":{}}})", name, dtype, shape, offsets);
}

struct Case {
  std::string what;
  std::string bytes;
  std::string rule;  ///< part of the expected message; empty: the file is fine
};

std::vector<Case> corpus() {
  const std::string one = entry("a", "[1]", "[0,4]");
  std::vector<Case> cases{
      {"length 2^63", little_endian(uint64_t{1} << 63) + "{}", "exceeds the limit"},
      {"length 2^64-1", little_endian(~uint64_t{0}) + "{}", "exceeds the limit"},
      {"length 100000001", little_endian(100'000'001) + "{}", "exceeds the limit"},
      {"length beyond the file", little_endian(100) + "{}", "exceeds the file"},
      {"length 0", file_of("", 0), "does not begin with '{'"},
      {"an array", file_of("[]", 0), "does not begin with '{'"},
      {"leading space", file_of(" {}", 0), "does not begin with '{'"},
      {"byte order mark", file_of("\xEF\xBB\xBF{}", 0), "does not begin with '{'"},
      {"invalid UTF-8 in a name", file_of("{" + entry("\xFF", "[1]", "[0,4]") + "}", 4), "not valid UTF-8"},
      {"overlong UTF-8", file_of("{" + entry("\xC0\x80", "[1]", "[0,4]") + "}", 4), "not valid UTF-8"},
      {"UTF-8 surrogate", file_of("{" + entry("\xED\xA0\x80", "[1]", "[0,4]") + "}", 4), "not valid UTF-8"},
      {"lone escaped surrogate", file_of("{" + entry("\\ud800", "[1]", "[0,4]") + "}", 4), "not valid UTF-8"},
      {"text after the object", file_of("{}x", 0), "not valid UTF-8 JSON"},
      {"NUL and text after the object", file_of(std::string("{}\0x", 4), 0), "not valid UTF-8 JSON"},
      {"a second object", file_of("{}{}", 0), "not valid UTF-8 JSON"},
      {"truncated JSON", file_of("{" + one, 4), "not valid UTF-8 JSON"},
      {"comment", file_of("{/**/}", 0), "not valid UTF-8 JSON"},
      {"trailing comma", file_of("{" + one + ",}", 4), "not valid UTF-8 JSON"},
      {"depth 100000 in place of an entry", file_of("{\"a\":" + repeat("[", 100'000), 0),
       "expected an object"},
      {"depth 100000 in an unknown field", file_of("{\"a\":{\"x\":" + repeat("[", 100'000), 0),
       "nested too deeply"},
      {"depth 100000 of objects", file_of("{\"a\":{\"x\":" + repeat("{\"y\":", 100'000), 0),
       "nested too deeply"},
      {"duplicate tensor", file_of("{" + one + "," + one + "}", 4), "duplicate tensor name"},
      {"duplicate tensor by escape", file_of("{" + one + "," + entry("\\u0061", "[1]", "[0,4]") + "}", 4),
       "duplicate tensor name"},
      {"duplicate __metadata__", file_of(R"({"__metadata__":{},"__metadata__":{}})", 0),
       "duplicate key __metadata__"},
      {"duplicate metadata key", file_of(R"({"__metadata__":{"k":"1","k":"2"}})", 0),
       "duplicate metadata key"},
      {"duplicate field",
       file_of(R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4),
       "duplicate field"},
      {"metadata number", file_of(R"({"__metadata__":{"k":1}})", 0), "is not a string"},
      {"metadata null", file_of(R"({"__metadata__":{"k":null}})", 0), "is not a string"},
      {"metadata object", file_of(R"({"__metadata__":{"k":{}}})", 0), "is not a string"},
      {"metadata array", file_of(R"({"__metadata__":[]})", 0), "expected an object"},
      {"metadata is a tensor", file_of("{" + entry("__metadata__", "[1]", "[0,4]") + "}", 4),
       "is not a string"},
      {"tensor is a number", file_of(R"({"a":1})", 0), "expected an object"},
      {"tensor is an array", file_of(R"({"a":["F32",[1],[0,4]]})", 4), "expected an object"},
      {"no dtype", file_of(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4), "dtype is missing"},
      {"no shape", file_of(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4), "shape is missing"},
      {"no offsets", file_of(R"({"a":{"dtype":"F32","shape":[1]}})", 4), "data_offsets is missing"},
      {"dtype number", file_of(R"({"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}})", 4),
       "dtype is not a string"},
      {"dtype list", file_of(R"({"a":{"dtype":[],"shape":[1],"data_offsets":[0,4]}})", 4),
       "dtype is not a string"},
      {"shape text", file_of(R"({"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}})", 4),
       "shape is not an array"},
      {"shape object", file_of(R"({"a":{"dtype":"F32","shape":{},"data_offsets":[0,4]}})", 4),
       "shape is not an array"},
      {"nested shape", file_of("{" + entry("a", "[[1]]", "[0,4]") + "}", 4), "non-negative integer"},
      {"negative shape", file_of("{" + entry("a", "[-1]", "[0,4]") + "}", 4), "non-negative integer"},
      {"float shape", file_of("{" + entry("a", "[1.0]", "[0,4]") + "}", 4), "non-negative integer"},
      {"overlap", file_of("{" + one + "," + entry("b", "[1]", "[2,6]") + "}", 6), "tensors overlap"},
      {"same range", file_of("{" + one + "," + entry("b", "[1]", "[0,4]") + "}", 4), "tensors overlap"},
      {"hole", file_of("{" + one + "," + entry("b", "[1]", "[8,12]") + "}", 12), "hole"},
      {"not starting at 0", file_of("{" + entry("a", "[1]", "[4,8]") + "}", 8), "hole"},
      {"reversed", file_of("{" + entry("a", "[1]", "[4,0]") + "}", 4), "reversed"},
      {"past the end", file_of("{" + entry("a", "[2]", "[0,8]") + "}", 4), "truncated"},
      {"far past the end", file_of("{" + entry("a", "[1073741824]", "[0,4294967296]") + "}", 4), "truncated"},
      {"negative offset", file_of("{" + entry("a", "[1]", "[-4,0]") + "}", 4), "non-negative integer"},
      {"float offset", file_of("{" + entry("a", "[1]", "[0,4.0]") + "}", 4), "non-negative integer"},
      {"exponent offset", file_of("{" + entry("a", "[1]", "[0,4e0]") + "}", 4), "non-negative integer"},
      {"offset of 2^63", file_of("{" + entry("a", "[1]", "[0,9223372036854775808]") + "}", 4), "63 bits"},
      {"offset above 2^64", file_of("{" + entry("a", "[1]", "[0,18446744073709551620]") + "}", 4),
       "non-negative integer"},
      {"three offsets", file_of("{" + entry("a", "[1]", "[0,4,4]") + "}", 4), "more than 2 numbers"},
      {"one offset", file_of("{" + entry("a", "[1]", "[0]") + "}", 4), "expected 2"},
      {"bytes after the last tensor", file_of("{" + one + "}", 5), "1 bytes follow the last tensor"},
      {"bytes and no tensor", file_of("{}", 1), "1 bytes follow"},
      {"product wraps to 4",
       file_of("{" + entry("a", "[4194305,4194305,211106198978564]", "[0,4]", "I8") + "}", 4), "overflows"},
      {"product and element size wrap", file_of("{" + entry("a", "[4611686018427387905]", "[0,4]") + "}", 4),
       "overflows"},
      {"overflow hidden by a 0", file_of("{" + entry("a", "[4611686018427387904,4,0]", "[0,0]") + "}", 0),
       "overflows"},
      {"0 elements with bytes", file_of("{" + entry("a", "[0]", "[0,4]") + "}", 4), "needs 0 bytes"},
      {"1000000 elements in 4 bytes", file_of("{" + entry("a", "[1000000]", "[0,4]") + "}", 4),
       "needs 4000000 bytes"},
      {"1000 dimensions", file_of("{" + entry("a", "[1" + repeat(",1", 999) + "]", "[0,4]") + "}", 4),
       "more than 64 dimensions"},
      {"unknown dtype", file_of("{" + entry("a", "[1]", "[0,4]", "F31") + "}", 4), "unknown dtype"},
      {"sub-byte dtype of odd count", file_of("{" + entry("a", "[1]", "[0,1]", "F4") + "}", 1),
       "not supported"},
      {"known but unsupported dtype", file_of("{" + entry("a", "[1]", "[0,1]", "F8_E8M0") + "}", 1),
       "not supported"},
      {"empty name", file_of("{" + entry("", "[1]", "[0,4]") + "}", 4), "is empty"},
      {"name of 1025 bytes", file_of("{" + entry(repeat("n", 1025), "[1]", "[0,4]") + "}", 4),
       "longer than 1024"},
      {"terminal escape in a name", file_of("{" + entry("\\u001b[2J", "[1]", "[0,4]") + "}", 4),
       "control character"},
      {"NUL in a name", file_of("{" + entry("a\\u0000b", "[1]", "[0,4]") + "}", 4), "control character"},
      {"C1 control in a name",
       file_of("{" +
                   entry("\xC2\x9B"
                         "2J",
                         "[1]", "[0,4]") +
                   "}",
               4),
       "control character"},
      {"17 fields",
       file_of(
           "{\"a\":{\"x0\":0" +
               [] {
                 std::string fields;
                 for (int i = 1; i < 17; ++i) fields += fmt::format(",\"x{}\":0", i);
                 return fields;
               }() +
               "}}",
           0),
       "more than 16 fields"},

      {"no tensors", file_of("{}", 0), ""},
      {"padding", file_of("{}      ", 0), ""},
      {"unaligned header", file_of("{" + one + "} ", 4), ""},
      {"rank 0", file_of("{" + entry("a", "[]", "[0,4]") + "}", 4), ""},
      {"empty tensor sharing an offset",
       file_of("{" + one + "," + entry("b", "[0,3]", "[0,0]") + "," + entry("c", "[0]", "[4,4]") + "}", 4),
       ""},
      {"listed in another order than stored", file_of("{" + entry("b", "[1]", "[4,8]") + "," + one + "}", 8),
       ""},
      {"unknown field",
       file_of(R"({"a":{"x":{"dtype":[{}]},"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4), ""},
      {"metadata", file_of(R"({"__metadata__":{"format":"pt"}})", 0), ""},
      {"name of 1024 bytes", file_of("{" + entry(repeat("n", 1024), "[1]", "[0,4]") + "}", 4), ""},
  };
  for (size_t n = 0; n < 8; ++n)
    cases.push_back({fmt::format("{} bytes", n), std::string(n, '\0'), "too few for the header length"});
  return cases;
}

TEST(SafetensorsCorpus, EachFileIsJudgedByItsRule) {
  const test::TemporaryDirectory directory;
  for (const Case& item : corpus()) {
    const auto path = directory / "file.safetensors";
    test::write_bytes(path, item.bytes);
    std::string outcome;
    try {
      const SafetensorsReader reader(path);
      for (const auto& [name, info] : reader.tensors()) static_cast<void>(reader.read(name));
    } catch (const DataError& error) {
      outcome = error.what();
      EXPECT_TRUE(outcome.starts_with(path.string()))
          << item.what << ": the message names no file: " << outcome;
      EXPECT_EQ(outcome.find('\x1b'), std::string::npos) << item.what << ": the message obeys the file";
    }
    if (item.rule.empty()) {
      EXPECT_EQ(outcome, "") << item.what;
    } else {
      EXPECT_NE(outcome.find(item.rule), std::string::npos)
          << item.what << ": expected '" << item.rule << "', found '" << outcome << "'";
    }
  }
}

TEST(SafetensorsCorpus, ABloatOfEmptyTensorsIsRefusedAtTheCap) {
  const test::TemporaryDirectory directory;
  std::string header = "{" + entry("t", "[0]", "[0,0]", "U8");
  for (int i = 0; i < 250'000; ++i) header += ',' + entry(fmt::format("t{}", i), "[0]", "[0,0]", "U8");
  test::write_bytes(directory / "bloat", file_of(header + "}", 0));
  EXPECT_NE(
      test::message_of<DataError>([&] { SafetensorsReader(directory / "bloat"); }).find("more than 200000"),
      std::string::npos);
}

}  // namespace
}  // namespace isobath::io
