#!/usr/bin/env bash
# From a fresh clone to a quantized model: installs, builds, makes a 135 M parameter model and real text, quantizes it
# to 3 bits on two ranks and prints what that cost. About ten minutes on two cores, downloads not counted.
#
# Every call starts over: runs/quickstart of an earlier call is removed. A folder of that name which this script did
# not make (it leaves runs/.quickstart beside it) is left alone, and the run then refuses it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
isobath_setup run

echo "quickstart: building"
isobath_logged cmake --preset cpu
isobath_logged cmake --build --preset cpu --target isobath
launch/prepare_data.sh

if [[ -f runs/.quickstart ]]; then
  rm -rf runs/quickstart
fi
mkdir -p runs
if [[ ! -e runs/quickstart ]]; then
  touch runs/.quickstart
fi
mpirun --quiet -n "${RANKS:-2}" build/cpu/bin/isobath run configs/quickstart.yaml
echo "quickstart: the quantized model is in runs/quickstart"
