#pragma once
#include <hdf5.h>

#include <isobath/io/hdf5_file.hpp>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

/// What Hdf5Writer and Hdf5Reader share: the rules of use of the C library.
namespace isobath::io {

/// Stands around every use of the library: one thread at a time (it may be built without thread safety), no
/// clean-up at exit (which crashes after a full disk), its own error printing off and its error stack empty.
class Hdf5Session {
 public:
  Hdf5Session();

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

/// The innermost reason on the library's error stack, e.g. "file write failed: … No space left on device …".
[[nodiscard]] std::string hdf5_reason();

/// An object of the library. `close` reports failure, the destructor does not.
class Hdf5Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Hdf5Handle() = default;
  Hdf5Handle(hid_t id, Close close_function) : id_(id), close_(close_function) {}
  ~Hdf5Handle() { close(); }
  Hdf5Handle(Hdf5Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Hdf5Handle& operator=(Hdf5Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }

  [[nodiscard]] bool valid() const { return id_ >= 0; }
  [[nodiscard]] hid_t id() const { return id_; }
  /// False when the library failed to close it.
  bool close() { return id_ < 0 || close_(std::exchange(id_, -1)) >= 0; }

 private:
  hid_t id_ = -1;
  Close close_ = nullptr;
};

/// Properties to open files with: strong close, and no file locks, which network file systems refuse.
[[nodiscard]] Hdf5Handle file_access();

/// "" and "/" are the root group, for the library and in messages.
[[nodiscard]] std::string object_path(const std::string& name);

}  // namespace isobath::io
