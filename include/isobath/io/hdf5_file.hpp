#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace isobath::io {

using Attribute = std::variant<int64_t, double, std::string, std::vector<std::string>>;

/// Writes a new HDF5 file (serial, default library version bounds, no time stamps: equal content gives equal
/// bytes). Datasets are contiguous; dtypes f32, f64, i8, u8, i32, i64, bf16 (stored as u16 with attribute
/// dtype="bfloat16"). A failure is remembered: `commit` then throws IoError and removes the temporary file;
/// HDF5 alone reports a full disk only sometimes (RELIABILITY: H5dont_atexit, strong close, sticky error,
/// re-read).
class Hdf5Writer {
 public:
  /// Creates `path`.tmp. Throws IoError.
  explicit Hdf5Writer(const std::filesystem::path& path);
  ~Hdf5Writer();  // without commit: removes the temporary file
  Hdf5Writer(Hdf5Writer&&) noexcept;
  Hdf5Writer& operator=(Hdf5Writer&&) noexcept;

  /// "a/b/c": groups are created on the way. CPU or device tensor, any strides.
  void write(const std::string& name, const at::Tensor& tensor);
  /// object "" or "/" is the root group; else an existing dataset or group.
  void attribute(const std::string& object, const std::string& name, const Attribute& value);
  /// Strong close, fsync, re-open and compare every dataset's bytes with the digest taken when it was
  /// written, rename to `path`, fsync the directory.
  void commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Reads an HDF5 file. Throws DataError (absent object, wrong type) or IoError.
class Hdf5Reader {
 public:
  explicit Hdf5Reader(const std::filesystem::path& path);
  ~Hdf5Reader();
  Hdf5Reader(Hdf5Reader&&) noexcept;
  Hdf5Reader& operator=(Hdf5Reader&&) noexcept;

  [[nodiscard]] bool contains(const std::string& name) const;
  [[nodiscard]] at::Tensor read(const std::string& name) const;
  /// Rows [begin, end) of dimension 0.
  [[nodiscard]] at::Tensor read_rows(const std::string& name, int64_t begin, int64_t end) const;
  [[nodiscard]] std::vector<int64_t> shape(const std::string& name) const;
  [[nodiscard]] Attribute attribute(const std::string& object, const std::string& name) const;
  [[nodiscard]] bool has_attribute(const std::string& object, const std::string& name) const;
  /// Names of the members of a group, sorted.
  [[nodiscard]] std::vector<std::string> members(const std::string& group) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace isobath::io
