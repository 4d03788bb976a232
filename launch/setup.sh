#!/usr/bin/env bash
# Installs what the project needs, once; a second call installs nothing.
#
#   launch/setup.sh run     system packages; .venv with LibTorch and the preparation scripts' modules (1.5 GB)
#   launch/setup.sh test    the same, and the Python oracles of the tests (6 GB); as root also Slurm, which one of them starts
#
# Sourced by the other scripts, so that the Open MPI settings below reach the programs they start.
# PYTHON names the interpreter for .venv; ISOBATH_SKIP_PACKAGES=1 leaves system packages to you.

isobath_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
isobath_log=$isobath_root/build/setup.log

# Runs a command silently; shows the end of the log and stops when it fails.
isobath_logged() {
  echo "+ $*" >>"$isobath_log"
  if ! "$@" >>"$isobath_log" 2>&1 </dev/null; then
    echo "setup: '$*' failed; the end of $isobath_log:" >&2
    tail -n 25 "$isobath_log" >&2
    exit 2
  fi
}

isobath_missing_packages() {
  local level=$1
  local tools=(cmake ninja g++ ccache git) tool_packages=(cmake ninja-build g++ ccache git)
  local libraries=(openmpi-bin libopenmpi-dev libhdf5-dev libboost-serialization-dev libfmt-dev libspdlog-dev
    libyaml-cpp-dev libcli11-dev nlohmann-json3-dev libssl-dev libxxhash-dev libglpk-dev libgtest-dev)
  local i package
  for i in "${!tools[@]}"; do
    command -v "${tools[$i]}" >/dev/null || echo "${tool_packages[$i]}"
  done
  # The test of Slurm's scripts skips itself without these, and without root.
  if [[ $level == test && $EUID -eq 0 ]]; then
    libraries+=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge)
  fi
  for package in "${libraries[@]}"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
  done
  [[ -x $isobath_root/.venv/bin/python ]] || "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
}

isobath_packages() {
  [[ -n ${ISOBATH_SKIP_PACKAGES:-} ]] && return 0
  if ! command -v dpkg-query >/dev/null; then
    echo "setup: not a Debian system. Install Open MPI, HDF5, Boost.Serialization, fmt, spdlog, yaml-cpp, CLI11," \
      "nlohmann-json, OpenSSL, xxHash, GLPK and GoogleTest (headers included), CMake >= 3.25, Ninja, GCC >= 12, ccache," \
      "then set ISOBATH_SKIP_PACKAGES=1" >&2
    exit 2
  fi
  local missing
  mapfile -t missing < <(isobath_missing_packages "$1")
  [[ ${#missing[@]} -eq 0 ]] && return 0
  if [[ $EUID -ne 0 ]]; then
    echo "setup: missing packages: ${missing[*]}" >&2
    echo "setup: install them with: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 2
  fi
  echo "setup: installing ${missing[*]}"
  isobath_logged apt-get update
  isobath_logged env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
}

# Installs tools/python/requirements-<level>.txt unless the stamp in .venv says that this very file was.
isobath_requirements() {
  local level=$1 folder=$isobath_root/tools/python stamp=$isobath_root/.venv/.isobath-$1 digest
  digest=$(cat "$folder"/requirements-*.txt | sha256sum)
  [[ -f $stamp && $(<"$stamp") == "$digest" ]] && return 0
  echo "setup: installing Python packages of level '$level' into .venv (log: build/setup.log)"
  [[ -x $isobath_root/.venv/bin/python ]] || isobath_logged "${PYTHON:-python3}" -m venv "$isobath_root/.venv"
  isobath_logged "$isobath_root/.venv/bin/python" -m pip install --disable-pip-version-check --no-deps \
    -r "$folder/requirements-$level.txt"
  echo "$digest" >"$stamp"
}

# Open MPI refuses root, and more ranks than cores, unless told; containers forbid its single-copy memory path.
isobath_environment() {
  if [[ $EUID -eq 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
  export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
  if [[ -e /.dockerenv || -e /run/.containerenv ]]; then
    export OMPI_MCA_btl_vader_single_copy_mechanism=none
  fi
}

# What a key of a configuration comes to: isobath_value_of PROGRAM KEY CONFIG --ranks N [--set KEY=VALUE ...].
# Prints what is wrong with a configuration that N ranks cannot run, and returns 2.
isobath_value_of() {
  local program=$1 key=$2 checked
  shift 2
  checked=$("$program" check "$@") || return 2
  awk -v key="$key" '!n && $1 == key { $1 = ""; sub(/^ +/, ""); sub(/ +$/, ""); print; n = 1 }' <<<"$checked"
}

isobath_setup() {
  case ${1:-} in
    run | test) ;;
    *) echo "usage: launch/setup.sh run|test" >&2; exit 2 ;;
  esac
  mkdir -p "$isobath_root/build"
  isobath_packages "$1"
  isobath_requirements run
  if [[ $1 == test ]]; then
    isobath_requirements test
  fi
  isobath_environment
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  isobath_setup "$@"
fi
