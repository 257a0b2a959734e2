"""Imported in place of the extension module ``_core...so`` only where that was not built.

Python prefers the extension module beside this file. Typically somebody installed dpcomm and then
started Python in the folder of its sources, which comes first on ``sys.path``.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

_here = Path(__file__).resolve().parent
_python = sysconfig.get_config_var("SOABI")
raise ImportError(
    f"dpcomm._core was not built for this Python ({_python}) in {_here}.\n"
    "If dpcomm is installed, leave the folder of its sources: Python takes what lies there first.\n"
    "Else build it in the folder of its sources:\n"
    "  pip install -e ."
)
