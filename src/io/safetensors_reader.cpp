#include <isobath/io/safetensors_reader.hpp>

#include <ATen/ATen.h>

#include <bit>
#include <cstring>
#include <isobath/core/digest.hpp>
#include <isobath/core/error.hpp>

#include "posix_file.hpp"
#include "safetensors_dtype.hpp"
#include "safetensors_header.hpp"

static_assert(std::endian::native == std::endian::little,
              "safetensors data is little-endian and read as it stands");

namespace isobath::io {

struct SafetensorsReader::State {
  std::filesystem::path path;
  SafetensorsHeader header;
  std::string header_digest;
  struct stat status {};

  /// Opened anew for every read: hundreds of shards would exhaust the file descriptors, and a file that was
  /// replaced meanwhile is noticed.
  [[nodiscard]] PosixFile open_unchanged() const {
    PosixFile file = PosixFile::open_for_reading(path);
    const struct stat now = file.status();
    if (now.st_size != status.st_size || now.st_mtim.tv_sec != status.st_mtim.tv_sec ||
        now.st_mtim.tv_nsec != status.st_mtim.tv_nsec) {
      fail<DataError>(
          "{} changed while it was in use: {} bytes when it was opened, {} now; expected the same file",
          path.string(), status.st_size, now.st_size);
    }
    return file;
  }

  [[nodiscard]] at::Tensor read(const std::string& name, const TensorInfo& info,
                                const std::vector<int64_t>& shape, int64_t begin, int64_t end) const {
    at::Tensor tensor = at::empty(shape, at::TensorOptions().dtype(info.dtype));
    if (begin == end) return tensor;
    const PosixFile file = open_unchanged();
    const std::span<std::byte> bytes(static_cast<std::byte*>(tensor.data_ptr()),
                                     static_cast<size_t>(end - begin));
    if (const int64_t n = file.read_at(bytes, begin); n != end - begin) {
      fail<DataError>(
          "{}: tensor {}: the file was truncated while it was in use; expected {} bytes at {}, found {}",
          path.string(), printable(name), end - begin, begin, n);
    }
    if (info.dtype == at::kBool) {
      // Any other bit pattern in a bool is undefined behaviour in C++.
      for (size_t i = 0; i < bytes.size(); ++i) {
        if (std::to_integer<int>(bytes[i]) > 1) {
          fail<DataError>("{}: tensor {}: a BOOL element holds the byte {} at {}; expected 0 or 1",
                          path.string(), printable(name), std::to_integer<int>(bytes[i]),
                          begin + static_cast<int64_t>(i));
        }
      }
    }
    return tensor;
  }
};

SafetensorsReader::SafetensorsReader(const std::filesystem::path& path) : state_(std::make_unique<State>()) {
  state_->path = path;
  const PosixFile file = PosixFile::open_for_reading(path);
  state_->status = file.status();
  const int64_t file_bytes = state_->status.st_size;
  uint64_t length = 0;
  if (file.read_at(std::as_writable_bytes(std::span(&length, 1)), 0) != sizeof length)
    fail<DataError>("{}: {} bytes are too few for the header length of a safetensors file (8)", path.string(),
                    file_bytes);
  if (length > static_cast<uint64_t>(kMaxHeaderBytes))
    fail<DataError>("{}: the header length {} exceeds the limit of {}", path.string(), length,
                    kMaxHeaderBytes);
  if (static_cast<int64_t>(length + sizeof length) > file_bytes)
    fail<DataError>("{}: the header length {} exceeds the file of {} bytes; is the file truncated?",
                    path.string(), length, file_bytes);
  std::string text(length, '\0');
  if (file.read_at(std::as_writable_bytes(std::span(text.data(), text.size())), sizeof length) !=
      static_cast<int64_t>(length))
    fail<DataError>("{}: the file was truncated while its header was read", path.string());
  state_->header = parse_safetensors_header(path.string(), text, file_bytes);
  state_->header_digest = Digest().update(text).hex();
}

SafetensorsReader::~SafetensorsReader() = default;
SafetensorsReader::SafetensorsReader(SafetensorsReader&&) noexcept = default;
SafetensorsReader& SafetensorsReader::operator=(SafetensorsReader&&) noexcept = default;

const std::filesystem::path& SafetensorsReader::path() const {
  return state_->path;
}
const std::map<std::string, TensorInfo>& SafetensorsReader::tensors() const {
  return state_->header.tensors;
}
const std::map<std::string, std::string>& SafetensorsReader::metadata() const {
  return state_->header.metadata;
}
int64_t SafetensorsReader::file_bytes() const {
  return state_->status.st_size;
}
const std::string& SafetensorsReader::header_digest() const {
  return state_->header_digest;
}

const TensorInfo& SafetensorsReader::info(const std::string& name) const {
  const auto found = state_->header.tensors.find(name);
  if (found == state_->header.tensors.end())
    fail<DataError>("{} holds no tensor {}; it has {} others", state_->path.string(), printable(name),
                    state_->header.tensors.size());
  return found->second;
}

at::Tensor SafetensorsReader::read(const std::string& name) const {
  const TensorInfo& tensor = info(name);
  return state_->read(name, tensor, tensor.shape, tensor.begin, tensor.end);
}

at::Tensor SafetensorsReader::read_rows(const std::string& name, int64_t begin, int64_t end) const {
  const TensorInfo& tensor = info(name);
  ISOBATH_CHECK(!tensor.shape.empty() && 0 <= begin && begin <= end && end <= tensor.shape[0],
                "rows [{}, {}) of tensor {} of shape [{}] in {}", begin, end, name,
                fmt::join(tensor.shape, ", "), state_->path.string());
  std::vector<int64_t> shape = tensor.shape;
  shape[0] = end - begin;
  const int64_t row_bytes = tensor.shape[0] == 0 ? 0 : (tensor.end - tensor.begin) / tensor.shape[0];
  return state_->read(name, tensor, shape, tensor.begin + begin * row_bytes, tensor.begin + end * row_bytes);
}

}  // namespace isobath::io
