"""Makes tests/torch/harness.py and what is shared here importable by the tests of this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
