#include <ATen/ATen.h>

#include <isobath/core/error.hpp>
#include <isobath/formats/compressed_tensors.hpp>
#include <isobath/formats/packing.hpp>

namespace isobath::formats::compressed_tensors {

io::NamedTensors encode(const std::string& module, const quant::QuantizedMatrix& matrix) {
  const auto& spec = matrix.spec;
  const std::array<int64_t, 2> shape{matrix.codes.size(0), matrix.codes.size(1)};
  io::NamedTensors tensors;
  tensors.emplace_back(module + ".weight_packed", pack_rows(matrix.codes, spec.bits));
  tensors.emplace_back(module + ".weight_scale", matrix.scale.to(spec.storage).contiguous());
  tensors.emplace_back(module + ".weight_shape", at::tensor(at::IntArrayRef(shape), at::kLong));
  // Loaders take a zero point as the sign of an asymmetric scheme and refuse it in a symmetric one.
  if (!spec.symmetric)
    tensors.emplace_back(module + ".weight_zero_point", pack_columns(matrix.zero, spec.bits));
  return tensors;
}

static at::Tensor read_shaped(const io::ShardedReader& tensors, const std::string& name, at::ScalarType dtype,
                              at::IntArrayRef shape) {
  if (!tensors.contains(name)) {
    fail<DataError>("{}: tensor {} is missing although its module is packed; the checkpoint is incomplete",
                    tensors.directory().string(), name);
  }
  const io::TensorInfo& info = tensors.info(name);
  if (info.dtype != dtype || at::IntArrayRef(info.shape) != shape) {
    fail<DataError>("{}: {} should be {} [{}], found {} [{}]; does config.json belong to this checkpoint?",
                    tensors.shard_of(name), name, c10::toString(dtype), fmt::join(shape, ", "),
                    c10::toString(info.dtype), fmt::join(info.shape, ", "));
  }
  return tensors.read(name);
}

std::optional<quant::QuantizedMatrix> SchemeTable::read(const io::ShardedReader& tensors,
                                                        const std::string& module) const {
  const std::string packed = module + ".weight_packed";
  if (!tensors.contains(packed)) return {};
  const Scheme* scheme = find(module);
  if (scheme == nullptr) {
    fail<DataError>("{}: {} is packed but no config group of quantization_config targets {}",
                    tensors.directory().string(), packed, module);
  }
  const at::Tensor shape = read_shaped(tensors, module + ".weight_shape", at::kLong, {2});
  const auto n_rows = shape[0].item<int64_t>(), n_columns = shape[1].item<int64_t>();
  const int bits = scheme->bits;
  if (n_rows <= 0 || n_columns <= 0 || (scheme->group > 0 && n_columns % scheme->group != 0)) {
    fail<DataError>("{}: {}.weight_shape is [{}, {}], which groups of {} columns do not divide",
                    tensors.shard_of(packed), module, n_rows, n_columns, scheme->group);
  }
  const std::string scale_name = module + ".weight_scale";
  if (!tensors.contains(scale_name)) {
    fail<DataError>("{}: tensor {} is missing although its module is packed", tensors.directory().string(),
                    scale_name);
  }
  quant::QuantizedMatrix matrix{{.bits = bits,
                                 .group = scheme->group,
                                 .symmetric = scheme->symmetric,
                                 .storage = tensors.info(scale_name).dtype},
                                {},
                                {},
                                {}};
  const int64_t groups = quant::n_groups(n_columns, matrix.spec);
  matrix.codes = unpack_rows(read_shaped(tensors, packed, at::kInt, {n_rows, (n_columns * bits + 31) / 32}),
                             bits, n_columns);
  matrix.scale = read_shaped(tensors, scale_name, matrix.spec.storage, {n_rows, groups});
  matrix.zero = scheme->symmetric ? at::zeros({n_rows, groups}, at::kChar)
                                  : unpack_columns(read_shaped(tensors, module + ".weight_zero_point",
                                                               at::kInt, {(n_rows * bits + 31) / 32, groups}),
                                                   bits, n_rows);
  return matrix;
}

at::Tensor SchemeTable::decode(const io::ShardedReader& tensors, const std::string& module) const {
  const std::optional<quant::QuantizedMatrix> matrix = read(tensors, module);
  return matrix ? quant::dequantize(*matrix) : at::Tensor();
}

}  // namespace isobath::formats::compressed_tensors
