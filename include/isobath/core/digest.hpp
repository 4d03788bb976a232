#pragma once
#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

namespace at {
class Tensor;
}

namespace isobath {

/// Streaming XXH3 128-bit checksum, 32 lower-case hex digits. Detects damage, not malice; runs at memory
/// speed.
class Digest {
 public:
  Digest();
  ~Digest();
  Digest(Digest&&) noexcept;
  Digest& operator=(Digest&&) noexcept;
  Digest& update(std::span<const std::byte> bytes);
  Digest& update(const std::string& text);
  /// Adds dtype, shape and bytes of a tensor (moved to the CPU and made contiguous if it is not).
  Digest& update(const at::Tensor& tensor);
  [[nodiscard]] std::string hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// XXH3-128 of a whole file's bytes, read with `pread` in 8 MiB pieces. Throws IoError.
[[nodiscard]] std::string file_digest(const std::filesystem::path& path);

/// SHA-256 of a whole file, 64 lower-case hex digits (the digest other tools record, e.g. of tokenizer.json).
/// Throws IoError.
[[nodiscard]] std::string file_sha256(const std::filesystem::path& path);

}  // namespace isobath
