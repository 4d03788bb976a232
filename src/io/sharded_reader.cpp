#include <ATen/core/Tensor.h>

#include <isobath/core/digest.hpp>
#include <isobath/core/error.hpp>
#include <isobath/io/files.hpp>
#include <isobath/io/safetensors_reader.hpp>
#include <nlohmann/json.hpp>
#include <set>

#include "posix_file.hpp"
#include "safetensors_dtype.hpp"

namespace isobath::io {
namespace {

using nlohmann::json;

constexpr int64_t kMaxIndexBytes = int64_t{64} << 20;
constexpr int kMaxIndexDepth = 8;
/// Of a shard, spread evenly over it, for the fingerprint.
constexpr int64_t kSamples = 8, kSampleBytes = 4096;
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

/// JSON as json::parse reads it, but duplicate keys (of which it would keep the last) and deep nesting are
/// refused.
json parse_strictly(const std::string& text, const std::string& file) {
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    if (depth > kMaxIndexDepth)
      fail<DataError>("{}: the JSON is nested more than {} deep", file, kMaxIndexDepth);
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
      fail<DataError>("{}: duplicate key {}", file, printable(value.get<std::string>()));
    return true;
  };
  if (text.find('\0') != std::string::npos) fail<DataError>("{}: not valid JSON: it holds a NUL byte", file);
  try {
    return json::parse(text, watch);
  } catch (const json::parse_error& error) {
    fail<DataError>("{}: not valid UTF-8 JSON (at byte {})", file, error.byte);
  }
}

bool is_plain_file_name(const std::string& name) {
  return name_fault(name).empty() && name.find_first_of("/\\") == std::string::npos && name.front() != '.';
}

}  // namespace

struct ShardedReader::State {
  fs::path directory;
  std::map<std::string, SafetensorsReader> shards;
  std::map<std::string, std::string> shard_of;

  void open_single() {
    const auto& shard = shards.emplace(kSingleFile, SafetensorsReader(directory / kSingleFile)).first->second;
    for (const auto& [name, info] : shard.tensors()) shard_of.emplace(name, kSingleFile);
  }

  void read_weight_map(const fs::path& path) {
    const std::string file = path.string();
    const json index = parse_strictly(read_text(path, kMaxIndexBytes), file);
    const auto weight_map = index.is_object() ? index.find("weight_map") : index.end();
    if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty())
      fail<DataError>("{}: expected an object weight_map with at least one tensor", file);
    for (const auto& [name, shard] : weight_map->items()) {
      if (const std::string_view fault = name_fault(name); !fault.empty())
        fail<DataError>("{}: the tensor name {} {}", file, printable(name), fault);
      if (!shard.is_string() || !is_plain_file_name(shard.get_ref<const std::string&>())) {
        fail<DataError>(
            "{}: tensor {}: its shard {} is not a plain file name", file, printable(name),
            printable(shard.is_string() ? shard.get_ref<const std::string&>() : shard.type_name()));
      }
      shard_of.emplace(name, shard.get<std::string>());
    }
  }

  void open_shards(const std::string& index_file) {
    for (const auto& [name, shard] : shard_of) {
      if (shards.contains(shard)) continue;
      try {
        shards.emplace(shard, SafetensorsReader(directory / shard));
      } catch (const Error& error) {
        fail<DataError>("the shard {} of tensor {}, named by {}, cannot be used: {}", printable(shard),
                        printable(name), index_file, error.what());
      }
    }
    for (const auto& [name, shard] : shard_of) {
      if (!shards.at(shard).tensors().contains(name))
        fail<DataError>("{}: tensor {} is not in its shard {}; is the shard of another version?", index_file,
                        printable(name), printable(shard));
    }
    // transformers loads whole shards, so that a tensor the index does not place there would win or lose by
    // chance.
    for (const auto& [shard, reader] : shards) {
      for (const auto& [name, info] : reader.tensors()) {
        const auto place = shard_of.find(name);
        if (place == shard_of.end())
          fail<DataError>("{}: tensor {} of shard {} is not in weight_map; rebuild the index", index_file,
                          printable(name), printable(shard));
        if (place->second != shard)
          fail<DataError>("{}: tensor {} is in two shards, {} and {}; only {} is named", index_file,
                          printable(name), printable(shard), printable(place->second),
                          printable(place->second));
      }
    }
  }

  [[nodiscard]] const SafetensorsReader& reader_of(const std::string& name) const {
    const auto found = shard_of.find(name);
    if (found == shard_of.end())
      fail<DataError>("the checkpoint {} holds no tensor {}; it has {} others", directory.string(),
                      printable(name), shard_of.size());
    return shards.at(found->second);
  }
};

ShardedReader::ShardedReader(const fs::path& directory) : state_(std::make_unique<State>()) {
  state_->directory = directory;
  std::error_code status;
  if (fs::exists(directory / kSingleFile, status)) {
    state_->open_single();
  } else if (const fs::path index = directory / kIndexFile; fs::exists(index, status)) {
    state_->read_weight_map(index);
    state_->open_shards(index.string());
  } else {
    fail<DataError>("{} holds no checkpoint: expected {} or {} there", directory.string(), kSingleFile,
                    kIndexFile);
  }
}

ShardedReader::~ShardedReader() = default;
ShardedReader::ShardedReader(ShardedReader&&) noexcept = default;
ShardedReader& ShardedReader::operator=(ShardedReader&&) noexcept = default;

const fs::path& ShardedReader::directory() const {
  return state_->directory;
}
bool ShardedReader::contains(const std::string& name) const {
  return state_->shard_of.contains(name);
}
const TensorInfo& ShardedReader::info(const std::string& name) const {
  return state_->reader_of(name).info(name);
}
at::Tensor ShardedReader::read(const std::string& name) const {
  return state_->reader_of(name).read(name);
}

at::Tensor ShardedReader::read_rows(const std::string& name, int64_t begin, int64_t end) const {
  return state_->reader_of(name).read_rows(name, begin, end);
}

std::vector<std::string> ShardedReader::names() const {
  std::vector<std::string> names;
  names.reserve(state_->shard_of.size());
  for (const auto& [name, shard] : state_->shard_of) names.push_back(name);
  return names;
}

std::string ShardedReader::fingerprint() const {
  Digest digest;
  std::vector<std::byte> sample(kSampleBytes);
  for (const auto& [name, reader] : state_->shards) {
    digest.update(fmt::format("{} {} {}\n", name, reader.file_bytes(), reader.header_digest()));
    // A model and its fine-tune differ in nothing but the weights.
    const PosixFile file = PosixFile::open_for_reading(reader.path());
    const int64_t last = std::max<int64_t>(0, reader.file_bytes() - kSampleBytes);
    for (int64_t i = 0; i < kSamples; ++i) {
      const int64_t n_read = file.read_at(sample, last * i / (kSamples - 1));
      digest.update(std::span<const std::byte>(sample).first(static_cast<size_t>(n_read)));
    }
  }
  return digest.hex();
}

const std::map<std::string, std::string>& ShardedReader::metadata_beside(const std::string& name) const {
  return state_->reader_of(name).metadata();
}

std::string ShardedReader::shard_of(const std::string& name) const {
  return state_->reader_of(name).path().filename().string();
}

}  // namespace isobath::io
