#!/usr/bin/env bash
# Installs what the tests need, builds everything and runs all tests; ends with CTest's summary.
# Arguments go to ctest, e.g. launch/test.sh -R quant
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
isobath_setup test

cmake --preset cpu
cmake --build --preset cpu
ctest --preset cpu -j "$(nproc)" "$@"
