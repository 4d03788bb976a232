#include "record.hpp"

#include <isobath/core/digest.hpp>
#include <isobath/core/error.hpp>

namespace isobath::checkpoint {
namespace {

constexpr int kManifestVersion = 1;
constexpr size_t kDigestLength = 32;
constexpr std::string_view kBeforeDigest = ",\n  \"digest\": \"";
constexpr std::string_view kAfterDigest = "\"\n}\n";

bool is_plain_relative(const std::string& name) {
  const std::filesystem::path path(name);
  if (name.empty() || path.is_absolute()) return false;
  for (const auto& part : path) {
    if (part == "..") return false;
  }
  return true;
}

}  // namespace

std::string seal(const Json& body) {
  std::string text;
  try {
    text = body.dump(2);
  } catch (const Json::exception& error) {
    fail<ConfigError>("a name or value of this run is not UTF-8 text and cannot be recorded: {}",
                      error.what());
  }
  ISOBATH_CHECK(text.ends_with("\n}"), "only a JSON object with fields can be sealed");
  text.resize(text.size() - 2);
  const std::string digest = Digest().update(text).hex();
  return text.append(kBeforeDigest).append(digest).append(kAfterDigest);
}

Json unseal(const std::string& text, const std::string& source) {
  const size_t tail = kBeforeDigest.size() + kDigestLength + kAfterDigest.size();
  const std::string_view whole = text;
  if (whole.size() <= tail || !whole.ends_with(kAfterDigest) ||
      whole.substr(whole.size() - tail, kBeforeDigest.size()) != kBeforeDigest) {
    fail<CheckpointError>("{} is damaged: it does not end with its own digest ({} bytes)", source,
                          text.size());
  }
  const std::string body = text.substr(0, text.size() - tail);
  const std::string recorded = text.substr(body.size() + kBeforeDigest.size(), kDigestLength);
  const std::string found = Digest().update(body).hex();
  if (recorded != found) {
    fail<CheckpointError>("{} is damaged: it records its digest as {}, its bytes have {}", source, recorded,
                          found);
  }
  Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded()) fail<CheckpointError>("{} is not JSON although its digest is right", source);
  return json;
}

std::string differences(const Fingerprint& recorded, const Fingerprint& now) {
  std::string text;
  const auto line = [&](const std::string& field, const std::string& then, const std::string& today) {
    text += fmt::format("{}{}: {} in the run, {} now", text.empty() ? "" : "\n  ", field, then, today);
  };
  for (const auto& [field, value] : recorded) {
    const auto found = now.find(field);
    if (found == now.end()) {
      line(field, value, "absent");
    } else if (found->second != value) {
      line(field, value, found->second);
    }
  }
  for (const auto& [field, value] : now) {
    if (!recorded.contains(field)) line(field, "absent", value);
  }
  return text;
}

Json FileRecord::to_json() const {
  Json json{{"name", name}, {"bytes", bytes}, {"xxh3", digest}};
  if (!datasets.empty()) json["datasets"] = datasets;
  return json;
}

FileRecord FileRecord::from_json(const Json& json) {
  FileRecord record{json.at("name"), json.at("bytes"), json.at("xxh3"), {}};
  if (json.contains("datasets")) record.datasets = json.at("datasets").get<std::vector<std::string>>();
  if (!is_plain_relative(record.name)) {
    fail<CheckpointError>("a manifest names the file \"{}\", which lies outside its directory", record.name);
  }
  return record;
}

FileRecord FileRecord::of(const std::filesystem::path& root, const std::string& name) {
  ISOBATH_CHECK(is_plain_relative(name), "\"{}\" is not a path below {}", name, root.string());
  std::error_code status;
  const auto bytes = std::filesystem::file_size(root / name, status);
  if (status) fail<IoError>("cannot read {}: {}", (root / name).string(), status.message());
  return {name, static_cast<int64_t>(bytes), file_digest(root / name), {}};
}

std::string FileRecord::problem_in(const std::filesystem::path& root) const {
  const std::filesystem::path path = root / name;
  std::error_code status;
  const auto size = std::filesystem::file_size(path, status);
  if (status) return fmt::format("{}: {}", path.string(), status.message());
  if (static_cast<int64_t>(size) != bytes) {
    return fmt::format("{} has {} bytes, the manifest records {}", path.string(), size, bytes);
  }
  try {
    const std::string found = file_digest(path);
    if (found != digest) {
      return fmt::format("{} is damaged: its digest is {}, the manifest records {}", path.string(), found,
                         digest);
    }
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

std::string Manifest::to_text() const {
  Json json{{"format", "isobath generation"}, {"version", kManifestVersion}, {"number", number}};
  json["ranks"] = rank_files.size();
  json["fingerprint"] = fingerprint;
  json["state"] = state.to_json();
  json["files"] = Json::array();
  for (const FileRecord& file : rank_files) json["files"].push_back(file.to_json());
  json["outputs"] = Json::array();
  for (const auto& [name, file] : outputs) json["outputs"].push_back(file.to_json());
  return seal(json);
}

Manifest Manifest::from_text(const std::string& text, const std::string& source) {
  const Json json = unseal(text, source);
  try {
    if (const int64_t version = json.at("version"); version != kManifestVersion) {
      fail<CheckpointError>(
          "{} has format version {}, this isobath reads version {}; continue with the isobath that "
          "wrote it",
          source, version, kManifestVersion);
    }
    Manifest manifest;
    manifest.number = json.at("number");
    manifest.fingerprint = json.at("fingerprint").get<Fingerprint>();
    manifest.state = FileRecord::from_json(json.at("state"));
    for (const Json& file : json.at("files")) manifest.rank_files.push_back(FileRecord::from_json(file));
    for (const Json& file : json.at("outputs")) {
      FileRecord record = FileRecord::from_json(file);
      manifest.outputs.emplace(record.name, std::move(record));
    }
    return manifest;
  } catch (const Json::exception& error) {
    fail<CheckpointError>("{} is not a manifest: {}", source, error.what());
  }
}

}  // namespace isobath::checkpoint
