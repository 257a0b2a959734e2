"""`python -m dpcomm.bench`."""

from __future__ import annotations

import sys

from dpcomm.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
