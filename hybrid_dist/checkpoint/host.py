"""Host memory that a save is copied into, so that the loop may go on while it is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor

from hybrid_dist.distributed.engine import Piece


class HostCopy:
    """One flat fp32 buffer, kept from save to save: fresh memory would cost as much as the copy itself.

    It is page-locked where the pieces come from a GPU, so that all of them are on their way before any has arrived. By
    CUDA's own call, for torch's allocator of pinned memory rounds up to a power of two, and keeps what it once had.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._locked = self._for_gpu = False

    def __call__(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with their values as they are now; overwritten by the next call. Waits for the device."""
        found = list(pieces)
        values = [tensor for piece in found for tensor in piece.values.values()]
        on_gpu = any(tensor.is_cuda for tensor in values)
        total = sum(tensor.numel() for tensor in values)
        if self._memory.numel() < total or self._for_gpu != on_gpu:
            self._grow(total, on_gpu)
        copied, end = [], 0
        for piece in found:
            held: dict[str, Tensor] = {}
            for kind, tensor in piece.values.items():
                begin, end = end, end + tensor.numel()
                held[kind] = self._memory[begin:end]
                held[kind].copy_(tensor.detach(), non_blocking=on_gpu)
            copied.append(Piece(piece.name, piece.start, held, piece.step))
        if on_gpu:
            torch.cuda.synchronize()
        return copied

    def _grow(self, total: int, lock: bool) -> None:
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._memory = torch.empty(0)  # the old one goes before the new one comes
        self._memory, self._for_gpu = torch.empty(total), lock
        self._locked = lock and _lock_pages(self._memory)


def _lock_pages(memory: Tensor) -> bool:
    """False where the system refuses to lock so much: copies are slower then and as right."""
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
        return True
    # CUDA remembers its last error until somebody asks, and torch asks after its next kernel.
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
    return False
