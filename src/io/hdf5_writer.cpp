#include <ATen/ATen.h>

#include <isobath/core/digest.hpp>
#include <isobath/core/error.hpp>
#include <isobath/io/files.hpp>

#include "hdf5_support.hpp"
#include "posix_file.hpp"
#include "tensor_pieces.hpp"

namespace isobath::io {
namespace {

struct StoredType {
  hid_t file_type;
  hid_t memory_type;
};

StoredType stored_type(const std::string& name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return {H5T_IEEE_F32LE, H5T_NATIVE_FLOAT};
    case at::kDouble:
      return {H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE};
    case at::kChar:
      return {H5T_STD_I8LE, H5T_NATIVE_INT8};
    case at::kByte:
      return {H5T_STD_U8LE, H5T_NATIVE_UINT8};
    case at::kInt:
      return {H5T_STD_I32LE, H5T_NATIVE_INT32};
    case at::kLong:
      return {H5T_STD_I64LE, H5T_NATIVE_INT64};
    case at::kBFloat16:
      return {H5T_STD_U16LE, H5T_NATIVE_UINT16};
    default:
      contract_violated("dtype is one that Hdf5Writer stores",
                        fmt::format("dataset {} of dtype {}", name, c10::toString(dtype)));
  }
}

/// Creation properties without time stamps: equal content must give equal bytes.
Hdf5Handle creation_properties(hid_t property_class) {
  Hdf5Handle properties(H5Pcreate(property_class), H5Pclose);
  H5Pset_obj_track_times(properties.id(), false);
  return properties;
}

/// Fixed length, NUL-padded UTF-8: variable-length strings live in a heap whose unused bytes are not
/// determined.
Hdf5Handle text_type(size_t length) {
  Hdf5Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type.id(), std::max<size_t>(length, 1));
  H5Tset_strpad(type.id(), H5T_STR_NULLPAD);
  H5Tset_cset(type.id(), H5T_CSET_UTF8);
  return type;
}

std::string padded(const std::vector<std::string>& texts, size_t length) {
  std::string bytes;
  for (const std::string& text : texts) {
    ISOBATH_CHECK(text.find('\0') == std::string::npos, "an HDF5 attribute cannot hold a NUL byte");
    bytes += text;
    bytes.append(std::max<size_t>(length, 1) - text.size(), '\0');
  }
  return bytes;
}

struct Written {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  std::string digest;
};

struct WrittenAttribute {
  std::string object, name;
  Attribute value;
};

std::span<const std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
}

/// Digest of the bytes as they stand in the file; empty when the dtype differs. Memory: kPieceBytes, or one
/// row.
std::string digest_in_pieces(const Hdf5Reader& reader, const std::string& name, const Written& written) {
  Digest digest;
  const int64_t n_rows = written.shape.empty() ? 1 : written.shape[0];
  int64_t row_bytes = static_cast<int64_t>(c10::elementSize(written.dtype));
  for (size_t i = 1; i < written.shape.size(); ++i) row_bytes *= written.shape[i];
  const int64_t rows_at_once = std::max<int64_t>(kPieceBytes / std::max<int64_t>(row_bytes, 1), 1);
  for (int64_t row = 0; row < n_rows; row += rows_at_once) {
    const at::Tensor piece = written.shape.empty()
                                 ? reader.read(name)
                                 : reader.read_rows(name, row, std::min(row + rows_at_once, n_rows));
    if (piece.scalar_type() != written.dtype) return {};
    digest.update(bytes_of(piece));
  }
  return digest.hex();
}

}  // namespace

struct Hdf5Writer::State {
  fs::path path, temporary;
  Hdf5Handle file;
  std::map<std::string, Written> datasets;
  std::vector<WrittenAttribute> attributes;
  int64_t data_bytes = 0;
  std::string failure;
  bool committed = false;

  ~State() {
    const Hdf5Session session;
    discard();
  }

  void discard() {
    file.close();
    std::error_code ignored;
    if (!committed && !temporary.empty()) fs::remove(temporary, ignored);
  }

  /// Remembers the failure: no later success of the library may hide it.
  [[noreturn]] void fail_sticky(const std::string& action) {
    failure = fmt::format("cannot {} {}: {}{}", action, temporary.string(), hdf5_reason(),
                          space_hint(temporary, data_bytes));
    throw IoError(failure);
  }
  void require(bool succeeded, const std::string& action) {
    if (!succeeded) fail_sticky(action);
  }
  void require_usable() const {
    ISOBATH_CHECK(!committed, "{} is already committed", path.string());
    if (!failure.empty()) throw IoError(failure);
  }

  void write_attribute(hid_t object, const std::string& name, hid_t file_type, hid_t memory_type, hid_t space,
                       const void* value, const std::string& action) {
    Hdf5Handle attribute(H5Acreate2(object, name.c_str(), file_type, space, H5P_DEFAULT, H5P_DEFAULT),
                         H5Aclose);
    require(attribute.valid() && H5Awrite(attribute.id(), memory_type, value) >= 0, action);
    require(attribute.close(), action);
  }

  void verify();
};

Hdf5Writer::Hdf5Writer(const fs::path& path) : state_(std::make_unique<State>()) {
  const Hdf5Session session;
  State& state = *state_;
  state.path = path;
  fs::path temporary = path;
  temporary += ".tmp";
  // Shows a missing directory or permission in the system's words, and removes a leftover instead of
  // following it.
  PosixFile::create(temporary).close();
  state.temporary = temporary;
  const Hdf5Handle creation = creation_properties(H5P_FILE_CREATE), access = file_access();
  state.file = {H5Fcreate(temporary.c_str(), H5F_ACC_TRUNC, creation.id(), access.id()), H5Fclose};
  state.require(state.file.valid(), "create");
}

Hdf5Writer::~Hdf5Writer() = default;
Hdf5Writer::Hdf5Writer(Hdf5Writer&&) noexcept = default;
Hdf5Writer& Hdf5Writer::operator=(Hdf5Writer&&) noexcept = default;

void Hdf5Writer::write(const std::string& name, const at::Tensor& tensor) {
  const Hdf5Session session;
  State& state = *state_;
  state.require_usable();
  ISOBATH_CHECK(tensor.defined() && !name.empty(), "dataset '{}' of {}", name, state.path.string());
  ISOBATH_CHECK(!state.datasets.contains(name), "dataset {} of {} is written twice", name,
                state.path.string());
  const StoredType type = stored_type(name, tensor.scalar_type());
  state.data_bytes += static_cast<int64_t>(tensor.nbytes());

  const at::Tensor plain = tensor.detach().cpu().contiguous();
  const std::vector<hsize_t> extents(plain.sizes().begin(), plain.sizes().end());
  Hdf5Handle space(extents.empty()
                       ? H5Screate(H5S_SCALAR)
                       : H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr),
                   H5Sclose);
  Hdf5Handle links(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(links.id(), 1);
  Hdf5Handle creation = creation_properties(H5P_DATASET_CREATE);
  H5Pset_fill_time(creation.id(), H5D_FILL_TIME_NEVER);
  const std::string action = fmt::format("write dataset {} to", name);
  Hdf5Handle dataset(H5Dcreate2(state.file.id(), name.c_str(), type.file_type, space.id(), links.id(),
                                creation.id(), H5P_DEFAULT),
                     H5Dclose);
  state.require(dataset.valid(), action);
  if (plain.numel() > 0) {
    state.require(
        H5Dwrite(dataset.id(), type.memory_type, H5S_ALL, H5S_ALL, H5P_DEFAULT, plain.const_data_ptr()) >= 0,
        action);
  }
  // Small datasets reach the disk here, not in H5Dwrite.
  state.require(dataset.close(), action);
  state.datasets.emplace(
      name, Written{plain.scalar_type(), plain.sizes().vec(), Digest().update(bytes_of(plain)).hex()});
  if (tensor.scalar_type() == at::kBFloat16) attribute(name, "dtype", std::string("bfloat16"));
}

void Hdf5Writer::attribute(const std::string& object, const std::string& name, const Attribute& value) {
  const Hdf5Session session;
  State& state = *state_;
  state.require_usable();
  const std::string path = object_path(object),
                    action = fmt::format("write attribute {} of {} to", name, path);
  Hdf5Handle target(H5Oopen(state.file.id(), path.c_str(), H5P_DEFAULT), H5Oclose);
  state.require(target.valid(), action);
  ISOBATH_CHECK(H5Aexists(target.id(), name.c_str()) == 0, "attribute {} of {} is written twice", name, path);
  Hdf5Handle scalar(H5Screate(H5S_SCALAR), H5Sclose);
  if (const auto* integer = std::get_if<int64_t>(&value)) {
    state.write_attribute(target.id(), name, H5T_STD_I64LE, H5T_NATIVE_INT64, scalar.id(), integer, action);
  } else if (const auto* real = std::get_if<double>(&value)) {
    state.write_attribute(target.id(), name, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, scalar.id(), real, action);
  } else if (const auto* text = std::get_if<std::string>(&value)) {
    const Hdf5Handle type = text_type(text->size());
    const std::string bytes = padded({*text}, text->size());
    state.write_attribute(target.id(), name, type.id(), type.id(), scalar.id(), bytes.data(), action);
  } else {
    const auto& texts = std::get<std::vector<std::string>>(value);
    size_t length = 0;
    for (const std::string& item : texts) length = std::max(length, item.size());
    const Hdf5Handle type = text_type(length);
    const hsize_t count = texts.size();
    const Hdf5Handle list(H5Screate_simple(1, &count, nullptr), H5Sclose);
    const std::string bytes = padded(texts, length);
    state.write_attribute(target.id(), name, type.id(), type.id(), list.id(), bytes.data(), action);
  }
  state.require(target.close(), action);
  state.attributes.push_back({path, name, value});
}

void Hdf5Writer::State::verify() {
  const auto differs = [&](const std::string& what) {
    failure = fmt::format("{}: {} does not read back as it was written; the disk may be full or faulty{}",
                          temporary.string(), what, space_hint(temporary, data_bytes));
    throw IoError(failure);
  };
  try {
    const Hdf5Reader reader(temporary);
    for (const auto& [name, written] : datasets) {
      if (reader.shape(name) != written.shape || digest_in_pieces(reader, name, written) != written.digest)
        differs("dataset " + name);
    }
    for (const WrittenAttribute& written : attributes) {
      if (reader.attribute(written.object, written.name) != written.value)
        differs(fmt::format("attribute {} of {}", written.name, written.object));
    }
  } catch (const DataError& error) {
    differs(fmt::format("the file ({})", error.what()));
  }
}

void Hdf5Writer::commit() {
  const Hdf5Session session;
  State& state = *state_;
  ISOBATH_CHECK(!state.committed, "{} is already committed", state.path.string());
  try {
    state.require_usable();
    state.require(state.file.close(), "finish");
    sync_file(state.temporary);
    state.verify();
    rename_durably(state.temporary, state.path);
    state.committed = true;
  } catch (const IoError& error) {
    if (state.failure.empty()) state.failure = error.what();
    state.discard();
    throw;
  }
}

}  // namespace isobath::io
