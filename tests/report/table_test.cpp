#include <gtest/gtest.h>

#include <isobath/core/error.hpp>
#include <isobath/report/table.hpp>

namespace isobath::report {
namespace {

TEST(Table, AlignsNumbersRightAndTextLeft) {
  Table table({"module", "bits", "mass"});
  table.add({"up_proj", "3", "12.5 %"});
  table.add({"q", "16", "1e-05"});

  EXPECT_EQ(table.text(),
            "module   bits    mass\n"
            "───────  ────  ──────\n"
            "up_proj     3  12.5 %\n"
            "q          16   1e-05\n");
}

TEST(Table, CountsCharactersNotBytes) {
  Table table({"Σα⁽⁶⁾", "name"});
  table.add({"1", "é"});
  table.add({"22222", "e\u0301x"});  // combining accent: no column of its own
  table.add({"3", "数"});            // wide: two columns
  table.add({"4", "abc"});

  EXPECT_EQ(table.text(),
            "Σα⁽⁶⁾  name\n"
            "─────  ────\n"
            "    1  é\n"
            "22222  e\u0301x\n"
            "    3  数\n"
            "    4  abc\n");
}

TEST(Table, AWideCharacterTakesTwoColumns) {
  Table table({"n", "v"});
  table.add({"数", "x"});
  table.add({"abc", "y"});

  EXPECT_EQ(table.text(), "n    v\n───  ─\n数   x\nabc  y\n");
}

TEST(Table, AColumnWithWordsKeepsItsHeaderLeft) {
  Table table({"value", "k"});
  table.add({"1", "a"});
  table.add({"automatic", "b"});

  EXPECT_EQ(table.text(),
            "value      k\n"
            "─────────  ─\n"
            "        1  a\n"
            "automatic  b\n");
}

TEST(Table, ShortRowsAreFilledAndLongOnesAreADefect) {
  Table table({"a", "b"});
  table.add({"x"});

  EXPECT_EQ(table.text(), "a  b\n─  ─\nx\n");
  EXPECT_THROW(table.add({"1", "2", "3"}), InternalError);
}

TEST(Table, BrokenUtf8DoesNotReadPastTheEnd) {
  Table table({"a"});
  table.add({"x\xF0\x9F"});

  EXPECT_NE(table.text().find("x\xF0\x9F"), std::string::npos);
}

}  // namespace
}  // namespace isobath::report
