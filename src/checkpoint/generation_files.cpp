#include "generation_files.hpp"

#include <boost/archive/binary_iarchive.hpp>
#include <boost/archive/binary_oarchive.hpp>
#include <boost/serialization/map.hpp>
#include <boost/serialization/string.hpp>
#include <boost/serialization/vector.hpp>
#include <charconv>
#include <isobath/core/error.hpp>
#include <isobath/core/log.hpp>
#include <optional>
#include <sstream>
#include <string_view>

namespace isobath::checkpoint {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kPrefix = "gen-";

/// The number of a directory called gen-000017; empty for any other name.
std::optional<int64_t> generation_number(const std::string& name) {
  if (!name.starts_with(kPrefix)) return std::nullopt;
  int64_t number = 0;
  const char* end = name.data() + name.size();
  const auto [stop, status] = std::from_chars(name.data() + kPrefix.size(), end, number);
  if (status != std::errc() || stop != end || name != generation_name(number)) return std::nullopt;
  return number;
}

}  // namespace

std::string generation_name(int64_t number) {
  return fmt::format("{}{:06}", kPrefix, number);
}

std::string rank_file_name(int rank) {
  return fmt::format("rank-{:04}.h5", rank);
}

Listing list_generations(const fs::path& directory) {
  Listing listing;
  std::error_code status;
  for (fs::directory_iterator entry(directory, status), end; !status && entry != end;
       entry.increment(status)) {
    const std::string name = entry->path().filename().string();
    if (const auto number = generation_number(name)) {
      listing.generations.insert(*number);
    } else if (name.ends_with(kTemporarySuffix) &&
               generation_number(name.substr(0, name.size() - std::string_view(kTemporarySuffix).size()))) {
      listing.unfinished.push_back(entry->path());
    }
  }
  if (status) fail<IoError>("cannot list {}: {}", directory.string(), status.message());
  return listing;
}

void remove_or_warn(const fs::path& path) {
  std::error_code status;
  fs::remove_all(path, status);
  if (status) log::warning("cannot remove {}: {}", path.string(), status.message());
}

void retire(const fs::path& generation) {
  const fs::path unfinished = generation.string() + kTemporarySuffix;
  std::error_code status;
  fs::rename(generation, unfinished, status);
  remove_or_warn(status ? generation : unfinished);
}

std::string archive(const RunState& state) {
  std::ostringstream stream;
  {
    boost::archive::binary_oarchive archive(stream);
    archive << state;
  }
  return stream.str();
}

RunState unarchive(const std::string& bytes) {
  std::istringstream stream(bytes);
  boost::archive::binary_iarchive archive(stream);
  RunState state;
  archive >> state;
  return state;
}

}  // namespace isobath::checkpoint
