"""Real data for what is trained in tests."""

from __future__ import annotations

import torch


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Handwritten digits: images, 1797 x 1 x 8 x 8 float32 in 0...1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target)
