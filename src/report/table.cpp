#include <isobath/report/table.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <isobath/core/error.hpp>
#include <string_view>

namespace isobath::report {
namespace {

/// Next code point of valid UTF-8; a stray byte counts as one.
char32_t next_code_point(std::string_view text, size_t& position) {
  const auto byte = [&](size_t at) { return static_cast<unsigned char>(text[at]); };
  const unsigned char first = byte(position);
  const size_t length = first < 0x80 ? 1 : first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : first >= 0xC0 ? 2 : 1;
  char32_t value = length == 1 ? first : first & (0xFF >> (length + 1));
  size_t used = 1;
  while (used < length && position + used < text.size() && (byte(position + used) & 0xC0) == 0x80)
    value = (value << 6) | (byte(position + used++) & 0x3F);
  position += used;
  return value;
}

struct Span {
  char32_t first, last;
};
// Combining marks take no column; East Asian wide characters and emoji take two (Unicode TR 11, the blocks in
// use).
constexpr std::array<Span, 6> kZeroWidth{{{0x0300, 0x036F},
                                          {0x1AB0, 0x1AFF},
                                          {0x200B, 0x200F},
                                          {0x20D0, 0x20FF},
                                          {0xFE00, 0xFE0F},
                                          {0xFE20, 0xFE2F}}};
constexpr std::array<Span, 8> kDoubleWidth{{{0x1100, 0x115F},
                                            {0x2E80, 0x303E},
                                            {0x3041, 0xA4CF},
                                            {0xAC00, 0xD7A3},
                                            {0xF900, 0xFAFF},
                                            {0xFF00, 0xFF60},
                                            {0x1F300, 0x1FAFF},
                                            {0x20000, 0x3FFFD}}};

size_t display_width(std::string_view text) {
  size_t width = 0;
  for (size_t position = 0; position < text.size();) {
    const char32_t c = next_code_point(text, position);
    const auto holds = [c](const Span& span) { return span.first <= c && c <= span.last; };
    if (std::any_of(kZeroWidth.begin(), kZeroWidth.end(), holds)) continue;
    width += std::any_of(kDoubleWidth.begin(), kDoubleWidth.end(), holds) ? 2 : 1;
  }
  return width;
}

bool is_digit(char c) {
  return '0' <= c && c <= '9';
}

/// A number, with or without one word of unit: "-1.5e-3", "12 %", "3.2 GiB", "nan".
bool is_numeric(std::string_view cell) {
  if (cell == "nan" || cell == "inf" || cell == "-inf") return true;
  size_t i = 0;
  if (i < cell.size() && (cell[i] == '-' || cell[i] == '+')) ++i;
  const size_t digits = i;
  while (i < cell.size() && (is_digit(cell[i]) || cell[i] == '.' || cell[i] == ',')) ++i;
  if (i == digits || !std::any_of(cell.begin(), cell.begin() + static_cast<std::ptrdiff_t>(i), is_digit))
    return false;
  if (i + 1 < cell.size() && (cell[i] == 'e' || cell[i] == 'E')) {
    size_t exponent = i + 1;
    if (cell[exponent] == '-' || cell[exponent] == '+') ++exponent;
    if (exponent < cell.size() && is_digit(cell[exponent])) {
      i = exponent;
      while (i < cell.size() && is_digit(cell[i])) ++i;
    }
  }
  if (i == cell.size()) return true;
  const std::string_view unit = cell.substr(cell[i] == ' ' ? i + 1 : i);
  constexpr size_t kLongestUnit = 10;
  return (cell[i] == ' ' || cell[i] == '%') && !unit.empty() && unit.size() <= kLongestUnit &&
         std::none_of(unit.begin(), unit.end(), [](char c) { return c == ' ' || is_digit(c); });
}

}  // namespace

Table::Table(std::vector<std::string> header) {
  rows_.push_back(std::move(header));
}

void Table::add(std::vector<std::string> row) {
  ISOBATH_CHECK(row.size() <= rows_[0].size(), "table row has {} cells, the header {}", row.size(),
                rows_[0].size());
  row.resize(rows_[0].size());
  rows_.push_back(std::move(row));
}

std::string Table::text() const {
  const size_t n_columns = rows_[0].size();
  std::vector<size_t> widths(n_columns, 0);
  std::vector<bool> is_number_column(n_columns, false);
  for (size_t column = 0; column < n_columns; ++column) {
    bool has_number = false, has_text = false;
    for (size_t row = 0; row < rows_.size(); ++row) {
      const std::string& cell = rows_[row][column];
      widths[column] = std::max(widths[column], display_width(cell));
      if (row == 0 || cell.empty()) continue;
      (is_numeric(cell) ? has_number : has_text) = true;
    }
    is_number_column[column] = has_number && !has_text;
  }
  std::string text;
  for (size_t row = 0; row < rows_.size(); ++row) {
    std::string line;
    for (size_t column = 0; column < n_columns; ++column) {
      const std::string& cell = rows_[row][column];
      const std::string padding(widths[column] - display_width(cell), ' ');
      const bool to_the_right = row == 0 ? is_number_column[column] : is_numeric(cell);
      line += (column == 0 ? "" : "  ") + (to_the_right ? padding + cell : cell + padding);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
    if (row > 0) continue;
    for (size_t column = 0; column < n_columns; ++column) {
      if (column > 0) text += "  ";
      for (size_t i = 0; i < widths[column]; ++i) text += "─";
    }
    text += "\n";
  }
  return text;
}

}  // namespace isobath::report
