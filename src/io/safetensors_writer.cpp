#include <isobath/io/safetensors_writer.hpp>

#include <ATen/ATen.h>
#include <unistd.h>

#include <algorithm>
#include <isobath/core/error.hpp>
#include <nlohmann/json.hpp>
#include <set>

#include "posix_file.hpp"
#include "safetensors_dtype.hpp"
#include "tensor_pieces.hpp"

namespace isobath::io {
namespace {

using nlohmann::json;

constexpr size_t kHeaderAlignment = 8;

/// Position in the format's dtype table, which is its layout order.
size_t rank_of(const std::string& name, at::ScalarType dtype) {
  for (size_t i = 0; i < kSafetensorsDtypes.size(); ++i) {
    if (kSafetensorsDtypes[i].dtype == dtype) return i;
  }
  contract_violated("dtype has a safetensors name",
                    fmt::format("tensor {} of dtype {}", name, c10::toString(dtype)));
}

std::vector<const NamedTensors::value_type*> in_file_order(const NamedTensors& tensors) {
  std::vector<const NamedTensors::value_type*> ordered;
  std::set<std::string_view> names;
  for (const auto& entry : tensors) {
    const std::string_view fault = name_fault(entry.first);
    ISOBATH_CHECK(fault.empty() && entry.first != kMetadataKey, "the tensor name {} {}",
                  printable(entry.first), fault.empty() ? "is reserved" : fault);
    ISOBATH_CHECK(names.insert(entry.first).second, "two tensors are named {}", entry.first);
    ISOBATH_CHECK(entry.second.defined(), "tensor {} is undefined", entry.first);
    ordered.push_back(&entry);
  }
  std::sort(ordered.begin(), ordered.end(), [](const auto* a, const auto* b) {
    const size_t rank_a = rank_of(a->first, a->second.scalar_type());
    const size_t rank_b = rank_of(b->first, b->second.scalar_type());
    return rank_a != rank_b ? rank_a > rank_b : a->first < b->first;
  });
  return ordered;
}

/// Composed as text: a JSON tree would sort the keys, and the order of the tensors is their layout.
std::string compose_header(const std::vector<const NamedTensors::value_type*>& ordered,
                           const std::map<std::string, std::string>& metadata) {
  std::string text = "{";
  if (!metadata.empty()) text += fmt::format("\"{}\":{}", kMetadataKey, json(metadata).dump());
  int64_t offset = 0;
  for (const auto* entry : ordered) {
    const at::Tensor& tensor = entry->second;
    const int64_t end = offset + static_cast<int64_t>(tensor.nbytes());
    text += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        text.size() > 1 ? "," : "", json(entry->first).dump(),
                        kSafetensorsDtypes[rank_of(entry->first, tensor.scalar_type())].name,
                        fmt::join(tensor.sizes(), ","), offset, end);
    offset = end;
  }
  text += "}";
  text.append((kHeaderAlignment - text.size() % kHeaderAlignment) % kHeaderAlignment, ' ');
  return text;
}

}  // namespace

void write_safetensors(const std::filesystem::path& path, const NamedTensors& tensors,
                       const std::map<std::string, std::string>& metadata) {
  const auto ordered = in_file_order(tensors);
  const std::string header = compose_header(ordered, metadata);
  ISOBATH_CHECK(header.size() <= static_cast<size_t>(kMaxHeaderBytes) &&
                    ordered.size() <= static_cast<size_t>(kMaxTensors),
                "{} tensors with a header of {} bytes do not fit one safetensors file; use more shards",
                ordered.size(), header.size());
  const uint64_t length = header.size();
  int64_t file_bytes = static_cast<int64_t>(sizeof length + header.size());
  for (const auto* entry : ordered) file_bytes += static_cast<int64_t>(entry->second.nbytes());

  const std::string temporary = fmt::format(".{}.tmp-{}", path.filename().string(), ::getpid());
  TemporaryFile file(path, path.parent_path() / temporary, file_bytes);
  file.append(std::as_bytes(std::span(&length, 1)));
  file.append(std::as_bytes(std::span(header.data(), header.size())));
  for (const auto* entry : ordered) {
    for_each_piece(entry->second, [&](std::span<const std::byte> bytes) { file.append(bytes); });
  }
  file.commit();
}

std::string shard_file_name(int64_t index, int64_t count) {
  ISOBATH_CHECK(1 <= index && index <= count, "shard {} of {}", index, count);
  return fmt::format("model-{:05d}-of-{:05d}.safetensors", index, count);
}

}  // namespace isobath::io
