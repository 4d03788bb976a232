#!/usr/bin/env bash
# From a fresh clone to a quantized model: installs, builds, makes a 135 M parameter model and real text, quantizes it
# to 3 bits on two ranks and prints what that cost.
#
# runs/quickstart belongs to this script: every call removes what an earlier one left there and starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
isobath_setup run

echo "quickstart: building"
isobath_logged cmake --preset cpu
isobath_logged cmake --build --preset cpu --target isobath
launch/prepare_data.sh

rm -rf runs/quickstart
mpirun --quiet -n "${RANKS:-2}" build/cpu/bin/isobath run configs/quickstart.yaml
echo "quickstart: the quantized model is in runs/quickstart"
