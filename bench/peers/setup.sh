#!/usr/bin/env bash
# Installs one peer into an environment of its own, .cache/peers/NAME, once; a second call installs nothing.
#
#   bench/peers/setup.sh llmcompressor|gptqmodel|autoround
#
# Versions are pinned by requirements-NAME.txt. The project's .venv (launch/setup.sh test) stands behind the environment's
# own packages and lends what is large and the same for all: CUDA's libraries, which torch links even where only its CPU
# part runs, Triton, and torch itself unless the file pins another one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

name=${1:-}
requirements=bench/peers/requirements-$name.txt
if [[ $# -ne 1 || ! -f $requirements ]]; then
  echo "usage: bench/peers/setup.sh llmcompressor|gptqmodel|autoround" >&2
  exit 2
fi
environment=.cache/peers/$name
python=$environment/bin/python
log=build/peers-$name.log
stamp=$environment/.isobath
digest=$(sha256sum <"$requirements")
if [[ -f $stamp && $(<"$stamp") == "$digest" ]]; then
  exit 0
fi
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "setup: no torch in .venv; run launch/setup.sh test first" >&2
  exit 2
fi

mkdir -p build .cache/peers
rm -rf "$environment"
.venv/bin/python -m venv "$environment"
lent=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

echo "setup: installing $name into $environment (log: $log)"
install=("$python" -m pip install --disable-pip-version-check --no-deps --no-compile)
if ! {
  # Source packages build with the environment's own setuptools, and gptqmodel without CUDA kernels.
  grep -E '^(setuptools|maturin|ninja|packaging|numpy)==' "$requirements" >"$environment/first.txt"
  "${install[@]}" -r "$environment/first.txt" wheel==0.46.3 &&
    echo "$lent" >"$own/isobath-lent.pth" &&
    BUILD_CUDA_EXT=0 MAX_JOBS=2 "${install[@]}" --no-build-isolation --ignore-installed -r "$requirements"
} >"$log" 2>&1 </dev/null; then
  echo "setup: pip failed; the end of $log:" >&2
  tail -n 25 "$log" >&2
  exit 2
fi
echo "$digest" >"$stamp"
