"""What torch calls at the end of `import torch` (entry point group `torch.backends`)."""

from __future__ import annotations

import contextlib


def register() -> None:
    """Makes the name "dpcomm" known to torch.distributed. Never raises, loads no library."""
    # torch ends its own import with an error if this one fails; whoever then asks for the backend
    # gets torch's error for an unknown name, and `import dpcomm` shows the cause.
    with contextlib.suppress(Exception):
        from dpcomm.backend import register as register_backend

        register_backend()
