#!/usr/bin/env bash
# Installs what the tests need, builds everything and runs all tests; ends with CTest's summary.
# Arguments go to ctest, e.g. launch/test.sh -R quant
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
isobath_setup test

cmake --preset cpu
cmake --build --preset cpu
# A busy mpirun may write to a rank that has just ended, after it gave up its handler: not a failure of the test.
trap '' PIPE
ctest --preset cpu -j "$(nproc)" "$@"
