#pragma once
#include <string>
#include <vector>

namespace isobath::report {

/// Plain-text table: first row is the header, numbers right-aligned. UTF-8 aware.
class Table {
 public:
  explicit Table(std::vector<std::string> header);
  void add(std::vector<std::string> row);
  [[nodiscard]] std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace isobath::report
