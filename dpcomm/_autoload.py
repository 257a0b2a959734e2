"""What torch calls at the end of `import torch` (entry point group `torch.backends`)."""

from __future__ import annotations


def register() -> None:
    """Makes the name "dpcomm" known to torch.distributed. Never raises, loads no library."""
