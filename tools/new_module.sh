#!/usr/bin/env bash
# Scaffolds a module: header, source, test and their CMake lines.
#   tools/new_module.sh <module> <class_file>      e.g. tools/new_module.sh plan cost_model
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
module=${1:?usage: tools/new_module.sh <module> <class_file>}
file=${2:?usage: tools/new_module.sh <module> <class_file>}
for word in "$module" "$file"; do
  [[ $word =~ ^[a-z][a-z0-9_]*$ ]] || { echo "new_module.sh: '$word' is not snake_case" >&2; exit 2; }
done
[[ ! -e src/$module ]] || { echo "new_module.sh: src/$module exists" >&2; exit 2; }
class=$(sed -E 's/(^|_)([a-z0-9])/\U\2/g' <<<"$file")

mkdir -p "include/isobath/$module" "src/$module" "tests/$module"
cat >"include/isobath/$module/$file.hpp" <<END
#pragma once

namespace isobath::$module {

/// One sentence: what a $class is.
class $class {};

}  // namespace isobath::$module
END
cat >"src/$module/$file.cpp" <<END
#include <isobath/$module/$file.hpp>
END
cat >"tests/$module/${file}_test.cpp" <<END
#include <gtest/gtest.h>

#include <isobath/$module/$file.hpp>

TEST($class, SaysInASentenceWhatItDoes) { FAIL() << "write the first test of $class"; }
END
cat >"tests/$module/CMakeLists.txt" <<END
isobath_add_test(${file}_test SOURCES ${file}_test.cpp LINK isobath::$module RANKS 1)
END

python3 - "$module" "$file" <<'END'
import pathlib, re, sys
module, file = sys.argv[1:]
path = pathlib.Path("src/CMakeLists.txt")
text = path.read_text()
block = f"isobath_add_module({module}\n  SOURCES {file}.cpp\n  HEADERS {file}.hpp\n  DEPENDS core)\n\n"
# Before the driver, which may use every other module.
assert "isobath_add_module(pipeline" in text
path.write_text(text.replace("isobath_add_module(pipeline", block + "isobath_add_module(pipeline", 1))
path = pathlib.Path("tests/CMakeLists.txt")
path.write_text(re.sub(r"(foreach\(module [\w ]*?)( pipeline)", rf"\1 {module}\2", path.read_text(), count=1))
END
echo "Made module $module. Next: its DEPENDS in src/CMakeLists.txt, a paragraph in docs/architecture.md, the failing test."
