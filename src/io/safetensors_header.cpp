#include "safetensors_header.hpp"

#include <algorithm>
#include <isobath/core/error.hpp>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

#include "safetensors_dtype.hpp"

namespace isobath::io {
namespace {

using nlohmann::json;

constexpr int kMaxSkippedDepth = 32;
constexpr size_t kMaxFields = 16;

/// Receives the tokens of the header and accepts exactly one structure:
///   {"__metadata__": {string: string}, name: {"dtype": string, "shape": [n…], "data_offsets": [begin, end],
///   unknown: any}}
class HeaderHandler final : public nlohmann::json_sax<json> {
 public:
  HeaderHandler(const std::string& file, SafetensorsHeader& header) : file_(file), header_(header) {}

  bool null() override { return scalar(); }
  bool boolean(bool) override { return scalar(); }
  bool number_integer(int64_t) override { return scalar(); }
  bool number_float(double, const std::string&) override { return scalar(); }
  bool binary(json::binary_t&) override { return scalar(); }
  bool number_unsigned(uint64_t value) override {
    if (place_ != Place::numbers) return scalar();
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      reject("{} does not fit 63 bits", value);
    if (field_ == "shape" && info_.shape.size() == kMaxDimensions)
      reject("it has more than {} dimensions", kMaxDimensions);
    if (field_ != "shape" && offsets_.size() == 2) reject("data_offsets has more than 2 numbers");
    (field_ == "shape" ? info_.shape : offsets_).push_back(static_cast<int64_t>(value));
    return true;
  }
  bool string(std::string& text) override {
    if (place_ == Place::metadata) {
      if (!header_.metadata.emplace(field_, text).second)
        reject("duplicate metadata key {}", printable(field_));
      return true;
    }
    if (place_ == Place::entry && field_ == "dtype") {
      info_.dtype = dtype_of(text);
      return true;
    }
    return scalar();
  }
  bool start_object(size_t) override {
    switch (place_) {
      case Place::start:
        place_ = Place::top;
        return true;
      case Place::top:
        place_ = tensor_.empty() ? Place::metadata : Place::entry;
        return true;
      default:
        return descend();
    }
  }
  bool end_object() override {
    if (place_ == Place::skipped) return ascend();
    if (place_ == Place::entry) finish_entry();
    place_ = place_ == Place::top ? Place::start : Place::top;
    return true;
  }
  bool start_array(size_t) override {
    if (place_ == Place::entry && (field_ == "shape" || field_ == "data_offsets")) {
      place_ = Place::numbers;
      return true;
    }
    return descend();
  }
  bool end_array() override {
    if (place_ == Place::skipped) return ascend();
    place_ = Place::entry;
    return true;
  }
  bool key(std::string& name) override {
    switch (place_) {
      case Place::top:
        begin_entry(name);
        return true;
      case Place::metadata:
        if (header_.metadata.size() == static_cast<size_t>(kMaxTensors))
          reject("more than {} metadata keys", kMaxTensors);
        field_ = name;
        return true;
      case Place::entry:
        if (std::find(seen_.begin(), seen_.end(), name) != seen_.end())
          reject("duplicate field {}", printable(name));
        if (seen_.size() == kMaxFields) reject("its entry has more than {} fields", kMaxFields);
        seen_.push_back(name);
        field_ = name;
        return true;
      default:
        return true;
    }
  }
  bool parse_error(size_t position, const std::string&, const json::exception&) override {
    fail<DataError>("{}: the header is not valid UTF-8 JSON (at its byte {})", file_, position);
  }

 private:
  enum class Place { start, top, metadata, entry, numbers, skipped };

  template <class... A>
  [[noreturn]] void reject(fmt::format_string<A...> format, A&&... arguments) const {
    const std::string where = place_ == Place::metadata ? std::string(kMetadataKey)
                              : tensor_.empty()         ? std::string("header")
                                                        : "tensor " + printable(tensor_);
    fail<DataError>("{}: {}: {}", file_, where, fmt::format(format, std::forward<A>(arguments)...));
  }

  void begin_entry(const std::string& name) {
    tensor_.clear();
    if (name == kMetadataKey) {
      if (has_metadata_) reject("duplicate key {}", kMetadataKey);
      has_metadata_ = true;
      return;
    }
    if (const std::string_view fault = name_fault(name); !fault.empty())
      reject("the tensor name {} {}", printable(name), fault);
    if (header_.tensors.size() == static_cast<size_t>(kMaxTensors))
      reject("the file names more than {} tensors", kMaxTensors);
    tensor_ = name;
    if (header_.tensors.contains(name)) reject("duplicate tensor name");
    info_ = {};
    offsets_.clear();
    seen_.clear();
    field_.clear();
  }

  void finish_entry() {
    for (const std::string_view field : {"dtype", "shape", "data_offsets"}) {
      if (std::find(seen_.begin(), seen_.end(), field) == seen_.end())
        reject("the field {} is missing", field);
    }
    if (offsets_.size() != 2) reject("data_offsets has {} numbers, expected 2", offsets_.size());
    info_.begin = offsets_[0];
    info_.end = offsets_[1];
    header_.tensors.emplace(tensor_, std::move(info_));
  }

  at::ScalarType dtype_of(const std::string& text) const {
    for (const SafetensorsDtype& known : kSafetensorsDtypes) {
      if (known.name != text) continue;
      if (!known.dtype) reject("dtype {} is not supported by isobath", text);
      return *known.dtype;
    }
    reject("unknown dtype {}", printable(text));
  }

  /// A value where only something else may stand, unless it belongs to an unknown field.
  bool scalar() const {
    switch (place_) {
      case Place::skipped:
        return true;
      case Place::start:
      case Place::top:
        reject("expected an object");
      case Place::metadata:
        reject("the value of {} is not a string", printable(field_));
      case Place::numbers:
        reject("{} holds something else than a non-negative integer", field_);
      case Place::entry:
        break;
    }
    if (field_ == "dtype") reject("dtype is not a string");
    if (field_ == "shape" || field_ == "data_offsets") reject("{} is not an array", field_);
    return true;
  }

  bool descend() {
    if (place_ == Place::skipped || (place_ == Place::entry && seen_.size() > 0)) {
      if (place_ == Place::entry) scalar();  // rejects an array or object in place of a known field
      place_ = Place::skipped;
      if (++skipped_depth_ > kMaxSkippedDepth) reject("the header is nested too deeply");
      return true;
    }
    return scalar();
  }

  bool ascend() {
    if (--skipped_depth_ == 0) place_ = Place::entry;
    return true;
  }

  const std::string& file_;
  SafetensorsHeader& header_;
  Place place_ = Place::start;
  int skipped_depth_ = 0;
  bool has_metadata_ = false;
  std::string tensor_, field_;
  TensorInfo info_{};
  std::vector<int64_t> offsets_;
  std::vector<std::string> seen_;
};

/// Bytes of a dense tensor, or nothing when a product leaves 63 bits. Extents of 0 count as 1 in the check,
/// because ATen multiplies the others into strides.
bool checked_bytes(const TensorInfo& info, int64_t& bytes) {
  int64_t extent_product = static_cast<int64_t>(c10::elementSize(info.dtype));
  bool is_empty = false;
  for (const int64_t extent : info.shape) {
    is_empty = is_empty || extent == 0;
    if (__builtin_mul_overflow(extent_product, std::max<int64_t>(extent, 1), &extent_product)) return false;
  }
  bytes = is_empty ? 0 : extent_product;
  return true;
}

void check_layout(const std::string& file, SafetensorsHeader& header, int64_t header_end,
                  int64_t file_bytes) {
  std::vector<std::pair<const std::string, TensorInfo>*> ordered;
  ordered.reserve(header.tensors.size());
  for (auto& entry : header.tensors) ordered.push_back(&entry);
  std::sort(ordered.begin(), ordered.end(), [](const auto* a, const auto* b) {
    return std::tie(a->second.begin, a->second.end) < std::tie(b->second.begin, b->second.end);
  });
  const int64_t data_bytes = file_bytes - header_end;
  int64_t expected = 0;
  for (auto* entry : ordered) {
    TensorInfo& info = entry->second;
    const std::string name = printable(entry->first);
    if (info.end < info.begin)
      fail<DataError>("{}: tensor {}: data_offsets are reversed: [{}, {}]", file, name, info.begin, info.end);
    if (info.begin != expected) {
      fail<DataError>("{}: tensor {}: its data begins at offset {}, expected {}: {}", file, name, info.begin,
                      expected, info.begin > expected ? "there is a hole in the data" : "tensors overlap");
    }
    int64_t bytes = 0;
    if (!checked_bytes(info, bytes))
      fail<DataError>("{}: tensor {}: the product of its shape [{}] overflows", file, name,
                      fmt::join(info.shape, ", "));
    if (bytes != info.end - info.begin) {
      fail<DataError>("{}: tensor {}: {} of shape [{}] needs {} bytes, data_offsets give {}", file, name,
                      c10::toString(info.dtype), fmt::join(info.shape, ", "), bytes, info.end - info.begin);
    }
    if (info.end > data_bytes) {
      fail<DataError>(
          "{}: tensor {}: the file is truncated: its data ends at offset {}, the file holds {} bytes of data",
          file, name, info.end, data_bytes);
    }
    expected = info.end;
    info.begin += header_end;
    info.end += header_end;
  }
  if (expected != data_bytes)
    fail<DataError>("{}: {} bytes follow the last tensor; expected none", file, data_bytes - expected);
}

}  // namespace

std::string_view name_fault(std::string_view name) {
  if (name.empty()) return "is empty";
  if (name.size() > kMaxNameBytes) return "is longer than 1024 bytes";
  for (size_t i = 0; i < name.size(); ++i) {
    const auto byte = static_cast<unsigned char>(name[i]);
    // U+0080 … U+009F are control characters too, and terminals obey them.
    const bool is_c1 = byte == 0xC2 && i + 1 < name.size() && static_cast<unsigned char>(name[i + 1]) < 0xA0;
    if (byte < 0x20 || byte == 0x7F || is_c1) return "holds a control character";
  }
  return {};
}

std::string printable(std::string_view name) {
  constexpr size_t kMaxPrinted = 100;
  const std::string cut(name.substr(0, kMaxPrinted));
  std::string text = json(cut).dump(-1, ' ', true, json::error_handler_t::replace);
  // JSON leaves DEL alone.
  std::replace(text.begin(), text.end(), '\x7f', '?');
  return name.size() > kMaxPrinted ? text + "…" : text;
}

SafetensorsHeader parse_safetensors_header(const std::string& file, std::string_view text,
                                           int64_t file_bytes) {
  if (text.empty() || text.front() != '{') fail<DataError>("{}: the header does not begin with '{{'", file);
  // nlohmann's lexer takes a NUL byte for the end of the text and would ignore what follows.
  if (text.find('\0') != std::string_view::npos) {
    fail<DataError>("{}: the header is not valid UTF-8 JSON (NUL at its byte {})", file, text.find('\0'));
  }
  SafetensorsHeader header;
  HeaderHandler handler(file, header);
  json::sax_parse(text, &handler);
  check_layout(file, header, static_cast<int64_t>(sizeof(uint64_t) + text.size()), file_bytes);
  return header;
}

}  // namespace isobath::io
