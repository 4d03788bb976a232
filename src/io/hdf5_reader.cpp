#include <ATen/ATen.h>

#include <algorithm>
#include <isobath/core/error.hpp>

#include "hdf5_support.hpp"
#include "posix_file.hpp"

namespace isobath::io {
namespace {

namespace fs = std::filesystem;

/// No filter of the library packs better (deflate: 1032 to 1), so a dataset that claims more was never
/// written.
constexpr int64_t kMaxCompression = 1032;

struct ElementType {
  at::ScalarType dtype;
  hid_t memory_type;
};

herr_t append_name(hid_t, const char* name, const H5L_info_t*, void* names) {
  static_cast<std::vector<std::string>*>(names)->emplace_back(name);
  return 0;
}

std::vector<std::string> read_texts(hid_t attribute, hid_t type, hid_t space, bool& succeeded) {
  const auto count = static_cast<size_t>(H5Sget_simple_extent_npoints(space));
  std::vector<std::string> texts(count);
  if (count == 0) return texts;
  if (H5Tis_variable_str(type) > 0) {
    std::vector<char*> pointers(count, nullptr);
    const Hdf5Handle memory_type(H5Tcopy(type), H5Tclose);
    succeeded = H5Aread(attribute, memory_type.id(), pointers.data()) >= 0;
    if (!succeeded) return texts;
    for (size_t i = 0; i < count; ++i) texts[i] = pointers[i] == nullptr ? "" : pointers[i];
    H5Dvlen_reclaim(memory_type.id(), space, H5P_DEFAULT, pointers.data());
    return texts;
  }
  const size_t length = H5Tget_size(type);
  std::string bytes(length * count, '\0');
  succeeded = H5Aread(attribute, type, bytes.data()) >= 0;
  for (size_t i = 0; i < count; ++i) {
    texts[i] = bytes.substr(i * length, length);
    texts[i].resize(std::min(texts[i].find('\0'), length));
  }
  return texts;
}

}  // namespace

struct Hdf5Reader::State {
  fs::path path;
  Hdf5Handle file;

  ~State() {
    const Hdf5Session session;
    file.close();
  }

  template <class... A>
  [[noreturn]] void reject(fmt::format_string<A...> format, A&&... arguments) const {
    fail<DataError>("{}: {}", path.string(), fmt::format(format, std::forward<A>(arguments)...));
  }

  /// The object, or an invalid handle. Soft and external links are not followed: they may lead to other
  /// files.
  [[nodiscard]] Hdf5Handle find(const std::string& name) const {
    std::string prefix;
    for (const fs::path& part : fs::path(name).relative_path()) {
      if (!prefix.empty()) prefix += '/';
      prefix += part.string();
      H5L_info_t link{};
      if (H5Lexists(file.id(), prefix.c_str(), H5P_DEFAULT) <= 0 ||
          H5Lget_info(file.id(), prefix.c_str(), &link, H5P_DEFAULT) < 0 || link.type != H5L_TYPE_HARD)
        return {};
    }
    return {H5Oopen(file.id(), object_path(name).c_str(), H5P_DEFAULT), H5Oclose};
  }

  [[nodiscard]] Hdf5Handle open_object(const std::string& name) const {
    Hdf5Handle object = find(name);
    if (!object.valid()) reject("there is no object {}", object_path(name));
    return object;
  }

  [[nodiscard]] Hdf5Handle open_dataset(const std::string& name) const {
    Hdf5Handle object = open_object(name);
    if (H5Iget_type(object.id()) != H5I_DATASET) reject("{} is not a dataset", name);
    return object;
  }

  [[nodiscard]] std::vector<int64_t> shape_of(hid_t dataset, const std::string& name) const {
    const Hdf5Handle space(H5Dget_space(dataset), H5Sclose);
    const int n_dimensions = H5Sget_simple_extent_ndims(space.id());
    if (n_dimensions < 0 || H5Sget_simple_extent_type(space.id()) == H5S_NULL)
      reject("dataset {} has no shape", name);
    std::vector<hsize_t> extents(static_cast<size_t>(n_dimensions));
    H5Sget_simple_extent_dims(space.id(), extents.data(), nullptr);
    return {extents.begin(), extents.end()};
  }

  [[nodiscard]] bool is_bfloat16(hid_t dataset) const {
    if (H5Aexists(dataset, "dtype") <= 0) return false;
    const Attribute value = attribute_of(dataset, "dtype", "dataset");
    const auto* text = std::get_if<std::string>(&value);
    return text != nullptr && *text == "bfloat16";
  }

  [[nodiscard]] ElementType element_type(hid_t dataset, const std::string& name) const {
    const Hdf5Handle type(H5Dget_type(dataset), H5Tclose);
    const size_t size = H5Tget_size(type.id());
    const H5T_class_t kind = H5Tget_class(type.id());
    const bool is_signed = kind == H5T_INTEGER && H5Tget_sign(type.id()) == H5T_SGN_2;
    if (kind == H5T_FLOAT && size == 4) return {at::kFloat, H5T_NATIVE_FLOAT};
    if (kind == H5T_FLOAT && size == 8) return {at::kDouble, H5T_NATIVE_DOUBLE};
    if (is_signed && size == 1) return {at::kChar, H5T_NATIVE_INT8};
    if (is_signed && size == 4) return {at::kInt, H5T_NATIVE_INT32};
    if (is_signed && size == 8) return {at::kLong, H5T_NATIVE_INT64};
    if (kind == H5T_INTEGER && !is_signed && size == 1) return {at::kByte, H5T_NATIVE_UINT8};
    if (kind == H5T_INTEGER && !is_signed && size == 2 && is_bfloat16(dataset))
      return {at::kBFloat16, H5T_NATIVE_UINT16};
    reject(
        "dataset {} has a type of {} bytes that isobath does not read; expected f32, f64, i8, u8, i32, i64 "
        "or "
        "bfloat16 (as u16 with the attribute dtype)",
        name, size);
  }

  /// Before memory is taken for it: the stored bytes must be able to hold what the shape claims.
  void check_size(hid_t dataset, const std::string& name, const ElementType& type,
                  const std::vector<int64_t>& shape) const {
    int64_t bytes = static_cast<int64_t>(c10::elementSize(type.dtype));
    bool overflows = false;
    for (const int64_t extent : shape)
      overflows =
          overflows || extent < 0 || __builtin_mul_overflow(bytes, std::max<int64_t>(extent, 1), &bytes);
    const Hdf5Handle creation(H5Dget_create_plist(dataset), H5Pclose);
    const H5D_layout_t layout = H5Pget_layout(creation.id());
    if (layout == H5D_VIRTUAL || H5Pget_external_count(creation.id()) > 0)
      reject("dataset {} keeps its data in other files; expected it inside", name);
    const bool is_empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
    const auto stored = static_cast<int64_t>(H5Dget_storage_size(dataset));
    const int64_t expansion = layout == H5D_CHUNKED ? kMaxCompression : 1;
    if (overflows || (!is_empty && bytes / expansion > stored))
      reject("dataset {} of shape [{}] holds only {} bytes", name, fmt::join(shape, ", "), stored);
  }

  [[nodiscard]] at::Tensor read(const std::string& name, const int64_t* rows) const {
    const Hdf5Handle dataset = open_dataset(name);
    std::vector<int64_t> shape = shape_of(dataset.id(), name);
    const ElementType type = element_type(dataset.id(), name);
    check_size(dataset.id(), name, type, shape);
    const Hdf5Handle file_space(H5Dget_space(dataset.id()), H5Sclose);
    if (rows != nullptr) {
      ISOBATH_CHECK(!shape.empty() && 0 <= rows[0] && rows[0] <= rows[1] && rows[1] <= shape[0],
                    "rows [{}, {}) of dataset {} of shape [{}] in {}", rows[0], rows[1], name,
                    fmt::join(shape, ", "), path.string());
      shape[0] = rows[1] - rows[0];
      std::vector<hsize_t> start(shape.size(), 0), count(shape.begin(), shape.end());
      start[0] = static_cast<hsize_t>(rows[0]);
      H5Sselect_hyperslab(file_space.id(), H5S_SELECT_SET, start.data(), nullptr, count.data(), nullptr);
    }
    at::Tensor tensor = at::empty(shape, at::TensorOptions().dtype(type.dtype));
    if (tensor.numel() == 0) return tensor;
    const std::vector<hsize_t> extents(shape.begin(), shape.end());
    const Hdf5Handle memory_space(
        extents.empty() ? H5Screate(H5S_SCALAR)
                        : H5Screate_simple(static_cast<int>(extents.size()), extents.data(), nullptr),
        H5Sclose);
    if (H5Dread(dataset.id(), type.memory_type, memory_space.id(), file_space.id(), H5P_DEFAULT,
                tensor.data_ptr()) < 0)
      reject("dataset {} cannot be read: {}", name, hdf5_reason());
    return tensor;
  }

  [[nodiscard]] Attribute attribute_of(hid_t object, const std::string& name,
                                       const std::string& place) const {
    const Hdf5Handle attribute(H5Aopen(object, name.c_str(), H5P_DEFAULT), H5Aclose);
    if (!attribute.valid()) reject("{} has no attribute {}", place, name);
    const Hdf5Handle type(H5Aget_type(attribute.id()), H5Tclose),
        space(H5Aget_space(attribute.id()), H5Sclose);
    const H5T_class_t kind = H5Tget_class(type.id());
    const H5S_class_t extent = H5Sget_simple_extent_type(space.id());
    bool succeeded = true;
    if (kind == H5T_STRING && (extent == H5S_SCALAR || extent == H5S_SIMPLE)) {
      std::vector<std::string> texts = read_texts(attribute.id(), type.id(), space.id(), succeeded);
      if (!succeeded) reject("attribute {} of {} cannot be read: {}", name, place, hdf5_reason());
      if (extent == H5S_SCALAR) return std::move(texts.front());
      return texts;
    }
    const bool is_single = H5Sget_simple_extent_npoints(space.id()) == 1;
    if (kind == H5T_INTEGER && is_single) {
      int64_t value = 0;
      succeeded = H5Aread(attribute.id(), H5T_NATIVE_INT64, &value) >= 0;
      if (succeeded) return value;
    } else if (kind == H5T_FLOAT && is_single) {
      double value = 0;
      succeeded = H5Aread(attribute.id(), H5T_NATIVE_DOUBLE, &value) >= 0;
      if (succeeded) return value;
    }
    if (!succeeded) reject("attribute {} of {} cannot be read: {}", name, place, hdf5_reason());
    reject("attribute {} of {} is neither an integer, a real number nor text", name, place);
  }
};

Hdf5Reader::Hdf5Reader(const fs::path& path) : state_(std::make_unique<State>()) {
  // A missing file is reported in the system's words.
  PosixFile::open_for_reading(path).close();
  const Hdf5Session session;
  state_->path = path;
  const Hdf5Handle access = file_access();
  if (H5Fis_hdf5(path.c_str()) <= 0) state_->reject("not an HDF5 file");
  state_->file = {H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.id()), H5Fclose};
  if (!state_->file.valid()) state_->reject("the HDF5 file cannot be opened: {}", hdf5_reason());
}

Hdf5Reader::~Hdf5Reader() = default;
Hdf5Reader::Hdf5Reader(Hdf5Reader&&) noexcept = default;
Hdf5Reader& Hdf5Reader::operator=(Hdf5Reader&&) noexcept = default;

bool Hdf5Reader::contains(const std::string& name) const {
  const Hdf5Session session;
  return state_->find(name).valid();
}

at::Tensor Hdf5Reader::read(const std::string& name) const {
  const Hdf5Session session;
  return state_->read(name, nullptr);
}

at::Tensor Hdf5Reader::read_rows(const std::string& name, int64_t begin, int64_t end) const {
  const Hdf5Session session;
  const int64_t rows[2] = {begin, end};
  return state_->read(name, rows);
}

std::vector<int64_t> Hdf5Reader::shape(const std::string& name) const {
  const Hdf5Session session;
  return state_->shape_of(state_->open_dataset(name).id(), name);
}

Attribute Hdf5Reader::attribute(const std::string& object, const std::string& name) const {
  const Hdf5Session session;
  return state_->attribute_of(state_->open_object(object).id(), name, object_path(object));
}

bool Hdf5Reader::has_attribute(const std::string& object, const std::string& name) const {
  const Hdf5Session session;
  const Hdf5Handle target = state_->find(object);
  return target.valid() && H5Aexists(target.id(), name.c_str()) > 0;
}

std::vector<std::string> Hdf5Reader::members(const std::string& group) const {
  const Hdf5Session session;
  const Hdf5Handle target = state_->open_object(group);
  if (H5Iget_type(target.id()) != H5I_GROUP) state_->reject("{} is not a group", object_path(group));
  std::vector<std::string> names;
  hsize_t position = 0;
  if (H5Literate(target.id(), H5_INDEX_NAME, H5_ITER_NATIVE, &position, append_name, &names) < 0)
    state_->reject("the members of {} cannot be listed: {}", object_path(group), hdf5_reason());
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace isobath::io
