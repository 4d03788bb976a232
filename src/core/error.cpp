#include <algorithm>
#include <isobath/core/error.hpp>

namespace isobath {

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
  ExitCode code = ExitCode::internal;
  if (const auto* known = dynamic_cast<const Error*>(&error)) code = known->code();
  try {
    std::rethrow_if_nested(error);
  } catch (const std::exception& inner) {
    return exit_code_of(inner);
  } catch (...) {
    return ExitCode::internal;
  }
  return code;
}

}  // namespace isobath
