#include <ATen/core/Tensor.h>
#include <unistd.h>

#include <isobath/core/error.hpp>
#include <isobath/io/files.hpp>
#include <isobath/io/scratch_file.hpp>

#include "posix_file.hpp"

namespace isobath::io {

struct ScratchFile::State {
  fs::path path;
  PosixFile file;
  int64_t n_bytes = 0;
};

ScratchFile::ScratchFile(const fs::path& directory) : state_(std::make_unique<State>()) {
  make_directories(directory);
  std::string name = (directory / "isobath-scratch-XXXXXX").string();
  state_->file = PosixFile::create_nameless(name);
  state_->path = name;
}

ScratchFile::~ScratchFile() = default;
ScratchFile::ScratchFile(ScratchFile&&) noexcept = default;
ScratchFile& ScratchFile::operator=(ScratchFile&&) noexcept = default;

int64_t ScratchFile::append(const at::Tensor& tensor) {
  ISOBATH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "a scratch file takes contiguous CPU tensors");
  const auto n_bytes = static_cast<int64_t>(tensor.nbytes());
  state_->file.append({static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()}, n_bytes);
  state_->n_bytes += n_bytes;
  return state_->n_bytes - n_bytes;
}

void ScratchFile::read(at::Tensor& tensor, int64_t begin) const {
  ISOBATH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), "a scratch file fills contiguous CPU tensors");
  const std::span<std::byte> bytes(static_cast<std::byte*>(tensor.mutable_data_ptr()), tensor.nbytes());
  if (const int64_t n_read = state_->file.read_at(bytes, begin); n_read != std::ssize(bytes))
    fail<IoError>("{}: expected {} bytes at {}, found {}; was the scratch file cut off?",
                  state_->path.string(), bytes.size(), begin, n_read);
}

}  // namespace isobath::io
