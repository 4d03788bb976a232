#include <algorithm>
#include <isobath/core/error.hpp>
#include <optional>

namespace isobath {
namespace {

std::optional<ExitCode> innermost_code(const std::exception& error) {
  std::optional<ExitCode> code;
  try {
    std::rethrow_if_nested(error);
  } catch (const std::exception& inner) {
    code = innermost_code(inner);
  } catch (...) {  // not ours: the outer error decides
  }
  if (const auto* known = dynamic_cast<const Error*>(&error); known != nullptr && !code) code = known->code();
  return code;
}

}  // namespace

void contract_violated(std::string_view expression, const std::string& message, std::source_location where) {
  std::string_view file = where.file_name();
  file.remove_prefix(file.rfind('/') == std::string_view::npos ? 0 : file.rfind('/') + 1);
  fail<InternalError>("{} (violated: {}; {}:{}); this is a defect of isobath, please report it", message,
                      expression, file, where.line());
}

std::string describe(const std::exception& error) {
  std::string text = error.what();
  // LibTorch appends its stack to what(); it is of no use to a user.
  text.erase(std::min(text.size(), text.find("\nException raised from")));
  try {
    std::rethrow_if_nested(error);
  } catch (const std::exception& inner) {
    text += " -> " + describe(inner);
  } catch (...) {
    text += " -> unknown error";
  }
  return text;
}

ExitCode exit_code_of(const std::exception& error) {
  return innermost_code(error).value_or(ExitCode::internal);
}

}  // namespace isobath
