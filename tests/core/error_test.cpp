#include <gtest/gtest.h>

#include <isobath/core/error.hpp>

namespace isobath {
namespace {

/// What `describe` and `exit_code_of` say of the exception that `action` throws.
template <class Action>
std::pair<std::string, ExitCode> summary_of(Action&& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return {describe(error), exit_code_of(error)};
  }
  return {"nothing was thrown", ExitCode::ok};
}

template <class Outer, class Inner>
[[noreturn]] void throw_nested(const Outer& outer, const Inner& inner) {
  try {
    throw inner;
  } catch (...) {
    std::throw_with_nested(outer);
  }
}

TEST(Error, CarriesItsCodeAndMessage) {
  const auto [text, code] = summary_of([] { fail<IoError>("cannot write {}: {} bytes left", "a.h5", 12); });
  EXPECT_EQ(text, "cannot write a.h5: 12 bytes left");
  EXPECT_EQ(code, ExitCode::io);
  EXPECT_EQ(summary_of([] { throw AgreedFailure(ExitCode::data, "x"); }).second, ExitCode::data);
}

TEST(Error, ContextStandsBeforeTheCauseAndTheCauseGivesTheCode) {
  const auto [text, code] = summary_of([] {
    try {
      throw_nested(std::runtime_error("observe"), NumericError("non-finite activation, channel 812"));
    } catch (...) {
      std::throw_with_nested(InternalError("layer 41"));
    }
  });
  EXPECT_EQ(text, "layer 41 -> observe -> non-finite activation, channel 812");
  EXPECT_EQ(code, ExitCode::numeric);
}

TEST(Error, TheInnermostErrorOfOursGivesTheCodeAlsoAroundAnotherCause) {
  const auto [text, code] =
      summary_of([] { throw_nested(DataError("tokens.safetensors"), std::runtime_error("unexpected end")); });
  EXPECT_EQ(text, "tokens.safetensors -> unexpected end");
  EXPECT_EQ(code, ExitCode::data);
}

TEST(Error, WithoutAnErrorOfOursTheCodeIsInternal) {
  EXPECT_EQ(summary_of([] { throw std::runtime_error("x"); }).second, ExitCode::internal);
  EXPECT_EQ(summary_of([] { throw_nested(std::runtime_error("x"), 42); }),
            std::pair(std::string("x -> unknown error"), ExitCode::internal));
}

TEST(Error, ABrokenContractNamesExpressionAndPlace) {
  const int n_channels = 3;
  const auto [text, code] = summary_of([&] { ISOBATH_CHECK(n_channels == 4, "{} channels", n_channels); });
  EXPECT_EQ(text.find("3 channels (violated: n_channels == 4; error_test.cpp:"), 0u) << text;
  EXPECT_EQ(code, ExitCode::internal);
}

}  // namespace
}  // namespace isobath
