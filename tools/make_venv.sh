#!/usr/bin/env bash
# usage: tools/make_venv.sh FOLDER [PYTHON]
# Makes a virtual environment with PYTHON, or with the first Python >= 3.10 that has venv and headers.
# With --probe for FOLDER it only says whether there is one.
set -euo pipefail
folder=$1
wanted=${2:-}

probe='
import sys
if sys.version_info < (3, 10): sys.exit("older than 3.10")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("without venv (ensurepip)")
import os, sysconfig
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("without headers (Python.h)")
'
candidates=(python3 python3.13 python3.12 python3.11 python3.10 /usr/bin/python3)
[ -n "$wanted" ] && candidates=("$wanted")

reasons=""
chosen=""
for candidate in "${candidates[@]}"; do
  path=$(command -v "$candidate" 2>/dev/null) || { reasons+="  $candidate: not found"$'\n'; continue; }
  if reason=$("$path" -c "$probe" 2>&1); then
    chosen=$path
    break
  fi
  reasons+="  $path: ${reason##*$'\n'}"$'\n'
done

if [ -z "$chosen" ]; then
  {
    echo "No Python that dpcomm can be built with:"
    printf '%s' "$reasons"
    echo "It needs Python >= 3.10 with venv and headers. On Debian and Ubuntu:"
    echo "  apt-get install python3 python3-venv python3-dev"
    echo "or name another one: make PYTHON=/path/to/python3.12 ..."
  } >&2
  exit 1
fi
[ "$folder" = --probe ] && exit 0
compiler=${CXX:-g++}
command -v "${compiler%% *}" >/dev/null || {
  echo "$compiler is missing. On Debian and Ubuntu: apt-get install g++" >&2
  exit 1
}

echo "Making $folder with $("$chosen" --version) ($chosen)"
rm -rf "$folder"
"$chosen" -m venv "$folder"
