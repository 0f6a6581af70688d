"""hybrid-dist: a ConvNeXt and a Swin Transformer side by side, on several tasks, over any number of GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from hybrid_dist.inference.predict import Predictor

__version__ = "0.1.0"


def load(path: str | Path, device: str | None = None) -> Predictor:
    """A trained model, ready to be asked: `hybrid_dist.load("runs/base").predict(["a.jpg"])`.

    Args:
        path: A run's folder, or one that `hybrid-dist export --format safetensors` made.
        device: `cpu`, `cuda`, `cuda:1`, …; the GPU if there is one, else the CPU.

    Raises:
        UserError: there is no model, or it can't be used; the message says what would do.
    """
    from hybrid_dist.inference.predict import load as load_predictor  # torch takes seconds to import

    return load_predictor(path, device)
