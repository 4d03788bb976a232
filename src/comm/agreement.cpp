#include <c10/util/Exception.h>

#include <algorithm>
#include <isobath/comm/communicator.hpp>
#include <map>
#include <vector>

namespace isobath::comm {
namespace {

// Longer runs of ranks are written as a range: 512 numbers would hide the message.
constexpr size_t kLongestListedRun = 3;

/// "0, 1 and 7", "0-63 and 70".
std::string list_ranks(const std::vector<int>& ranks) {
  std::vector<std::string> words;
  for (size_t begin = 0; begin < ranks.size();) {
    size_t end = begin + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    if (end - begin > kLongestListedRun) {
      words.push_back(fmt::format("{}-{}", ranks[begin], ranks[end - 1]));
    } else {
      for (size_t i = begin; i < end; ++i) words.push_back(std::to_string(ranks[i]));
    }
    begin = end;
  }
  std::string text = words[0];
  for (size_t i = 1; i < words.size(); ++i) text += (i + 1 == words.size() ? " and " : ", ") + words[i];
  return text;
}

struct Failure {
  std::string text;
  std::string host;
  std::vector<int> ranks;
};

}  // namespace

void Communicator::agree(const std::string& failure, ExitCode code) const {
  // One integer settles the usual case: 0, or the largest exit code of the failing ranks.
  int32_t local_code = 0;
  if (!failure.empty()) local_code = static_cast<int32_t>(code == ExitCode::ok ? ExitCode::internal : code);
  const int32_t global_code = all_reduce(local_code, Reduce::max);
  if (global_code == 0) return;

  const std::vector<std::string> texts = all_gather(failure);
  const std::vector<std::string> hosts = all_gather(failure.empty() ? "" : host());
  std::vector<Failure> failures;
  for (size_t r = 0; r < texts.size(); ++r) {
    if (texts[r].empty()) continue;
    const auto same =
        std::find_if(failures.begin(), failures.end(), [&](const Failure& f) { return f.text == texts[r]; });
    if (same == failures.end()) {
      failures.push_back({texts[r], hosts[r], {static_cast<int>(r)}});
    } else {
      same->ranks.push_back(static_cast<int>(r));
    }
  }
  std::string message;
  for (const Failure& f : failures) {
    if (!message.empty()) message += '\n';
    message += f.ranks.size() == 1 ? fmt::format("rank {} ({}): {}", f.ranks[0], f.host, f.text)
                                   : fmt::format("ranks {}: {}", list_ranks(f.ranks), f.text);
  }
  throw AgreedFailure(static_cast<ExitCode>(global_code), message);
}

void Communicator::agree_on(const std::function<void()>& action) const {
  std::string failure;
  ExitCode code = ExitCode::ok;
  try {
    action();
  } catch (const c10::Error& error) {
    // what() carries a stack with addresses, which differ between ranks and would keep equal failures apart.
    failure = error.what_without_backtrace();
    code = ExitCode::internal;
  } catch (const std::exception& error) {
    failure = describe(error);
    code = exit_code_of(error);
  } catch (...) {
    failure = "unknown error";
    code = ExitCode::internal;
  }
  if (code != ExitCode::ok && failure.empty()) failure = "error without a message";
  agree(failure, code);
}

bool Communicator::any(bool value) const {
  return all_reduce<int32_t>(value ? 1 : 0, Reduce::max) != 0;
}

}  // namespace isobath::comm
