"""The same bits from the same run: algorithms whose result does not depend on which thread of a GPU comes first."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from hybrid_dist.errors import UserError

WORKSPACES = (":4096:8", ":16:8")
"""With one of these cuBLAS adds up in one order (docs.nvidia.com/cuda/cublas, «Results reproducibility»)."""


def choose_algorithms(deterministic: bool) -> None:
    """Have torch, cuDNN and cuBLAS use deterministic algorithms alone, or whichever they like; before CUDA begins."""
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        torch.backends.cudnn.benchmark = False  # it takes what was fastest this time
        if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in WORKSPACES:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = WORKSPACES[0]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """An operation that torch refuses here for want of a deterministic algorithm is the user's to know.

    Raises:
        UserError: names the operation. All ranks make the same operations, so all meet it.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        what = f"train.deterministic: {found[1]} has no deterministic implementation"
        raise UserError(f"{what}; false, or a model without it, would do", shared=True) from None
