#!/usr/bin/env bash
# usage: tools/test_with_torch.sh VERSION [arguments of pytest]
# Builds a copy of the sources for that torch, in build/torch-VERSION with an environment of its own,
# and runs the backend's tests there. torch comes without its dependencies: those for CUDA are several
# GB, and tools/cuda_stubs.py stands in for them where torch cannot be imported without.
set -euo pipefail
version=$1
shift
[ $# -gt 0 ] || set -- tests/torch tests/ddp tests/torch_features
root=$(cd "$(dirname "$0")/.." && pwd)
here=$root/build/torch-$version
copy=$here/dpcomm
python=$here/venv/bin/python
install() { "$python" -m pip --disable-pip-version-check install --quiet "$@"; }

if [ ! -e "$here/ready" ]; then
  mkdir -p "$here"
  "$root/tools/make_venv.sh" "$here/venv" "${PYTHON:-}"
  install -r "$root/requirements/build.txt" -r "$root/requirements/test.txt"
  install --no-deps "torch==$version"
  install filelock typing_extensions sympy networkx jinja2 fsspec
  touch "$here/ready"
fi
rm -rf "$copy/tests"
mkdir -p "$copy"
for each in csrc cmake dpcomm tests docs tools examples bench CMakeLists.txt setup.py pyproject.toml \
  README.md LICENSE MANIFEST.in; do
  cp -rpu "$root/$each" "$copy/"
done
rm -f "$copy"/dpcomm/*.so "$copy/dpcomm/_build_record.py"
cd "$copy"
DPCOMM_TORCH=on DPCOMM_CUDA=off install --no-build-isolation --no-deps --editable .
if ! "$python" -c "import torch" 2>"$here/import.log"; then
  folder=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
  "$python" tools/cuda_stubs.py "$folder" "$here/stubs"
  export LD_LIBRARY_PATH=$here/stubs${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
"$python" -W ignore -c "import torch; print('torch', torch.__version__, 'of', torch.__file__)"
exec "$python" -m pytest "$@"
