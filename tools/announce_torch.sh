#!/usr/bin/env bash
# usage: tools/announce_torch.sh PYTHON
# Says before torch is downloaded how much that may be.
set -euo pipefail
"$1" - <<'PYTHON'
import platform, sys
print(f"Installing torch for Python {sys.version_info[0]}.{sys.version_info[1]}, {platform.machine()}.")
print("Where pip finds only a CUDA build this downloads several GB. A CPU build is 0.2 GB:")
print("  make venv PIP_INDEX_URL=<an index with CPU builds of torch>  (docs/installing.md)")
PYTHON
