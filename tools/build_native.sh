#!/usr/bin/env bash
# usage: tools/build_native.sh VENV BUILD_FOLDER [CMake arguments]
# Builds the native parts with CMake alone, with the tools of VENV; nothing is installed.
set -euo pipefail
venv=$(cd "$1" && pwd)
folder=$2
shift 2
python=$venv/bin/python
mkdir -p "$folder"
torch=$("$python" -c 'import importlib.util as u, pathlib as p
spec = u.find_spec("torch")
print(p.Path(spec.origin).parent if spec else "")')
"$venv/bin/cmake" -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DDPCOMM_TORCH_ROOT="$torch" "$@" >"$folder.log" 2>&1 || { cat "$folder.log" >&2; exit 1; }
"$venv/bin/cmake" --build "$folder" -j "${MAX_JOBS:-$(nproc)}"
