#include <isobath/core/digest.hpp>

#include <ATen/core/Tensor.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <unistd.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <isobath/core/error.hpp>
#include <vector>

namespace isobath {
namespace {

template <class Consume>
void read_file(const std::filesystem::path& path, Consume&& consume) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail<IoError>("cannot open {}: {}", path.string(), std::strerror(errno));
  std::vector<std::byte> buffer(8u << 20);
  off_t offset = 0;
  for (;;) {
    const ssize_t n = ::pread(descriptor, buffer.data(), buffer.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int reason = errno;
      ::close(descriptor);
      fail<IoError>("cannot read {} at byte {}: {}", path.string(), offset, std::strerror(reason));
    }
    if (n == 0) break;
    consume(std::span<const std::byte>(buffer.data(), static_cast<size_t>(n)));
    offset += n;
  }
  ::close(descriptor);
}

std::string to_hex(std::span<const unsigned char> bytes) {
  std::string text;
  for (const unsigned char byte : bytes) text += fmt::format("{:02x}", byte);
  return text;
}

}  // namespace

struct Digest::State {
  XXH3_state_t* hash = XXH3_createState();
  ~State() { XXH3_freeState(hash); }
};

Digest::Digest() : state_(std::make_unique<State>()) {
  XXH3_128bits_reset(state_->hash);
}
Digest::~Digest() = default;
Digest::Digest(Digest&&) noexcept = default;
Digest& Digest::operator=(Digest&&) noexcept = default;

Digest& Digest::update(std::span<const std::byte> bytes) {
  XXH3_128bits_update(state_->hash, bytes.data(), bytes.size());
  return *this;
}

Digest& Digest::update(const std::string& text) {
  return update(std::as_bytes(std::span(text.data(), text.size())));
}

Digest& Digest::update(const at::Tensor& tensor) {
  const at::Tensor plain = tensor.detach().cpu().contiguous();
  std::string shape = c10::toString(plain.scalar_type());
  for (const int64_t extent : plain.sizes()) shape += fmt::format(",{}", extent);
  update(shape);
  return update({static_cast<const std::byte*>(plain.const_data_ptr()), plain.nbytes()});
}

std::string Digest::hex() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_->hash));
  return to_hex(canonical.digest);
}

std::string file_digest(const std::filesystem::path& path) {
  Digest digest;
  read_file(path, [&](std::span<const std::byte> bytes) { digest.update(bytes); });
  return digest.hex();
}

std::string file_sha256(const std::filesystem::path& path) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  ISOBATH_CHECK(EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1, "OpenSSL offers no SHA-256");
  read_file(path, [&](std::span<const std::byte> bytes) {
    EVP_DigestUpdate(context.get(), bytes.data(), bytes.size());
  });
  std::array<unsigned char, 32> value{};
  EVP_DigestFinal_ex(context.get(), value.data(), nullptr);
  return to_hex(value);
}

}  // namespace isobath
