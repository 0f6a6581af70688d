"""Dropout and stochastic depth that follow from the sample, not from who is in its micro batch with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

BITS = 24
"""Of a draw: as many as fp32 tells apart."""
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def mix(values: Tensor) -> Tensor:
    """int64 → int64 of the same shape, each bit of which follows from all of the value's: SplitMix64's finaliser.

    Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators". Arithmetic alone, so that every device
    draws the same, and no generator has a state.
    """
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def sample_keys(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """(count,) int64 on the device, for the samples that stand at `first` and after it in the global batch.

    Args:
        seed: Of the optimizer step, 63 bits.
    """
    return mix(torch.arange(first + 1, first + count + 1, device=device) * _GOLDEN + seed)


def seed_draws(seed: int, device: torch.device) -> None:
    """What a backbone draws by other means than `Noise`, on this device, follows from the seed from here on.

    Like `torch.manual_seed`, which also notes the seed and a stack trace for each kind of device that there might be:
    more than a millisecond each time.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def _kept(drawn: Tensor, probability: Tensor | float) -> Tensor:
    """Bool: which of the drawn values stay, where each goes with that probability."""
    return _shifted(drawn, 64 - BITS) >= probability * (1 << BITS)


class Noise:
    """What a model's dropout and stochastic depth draw from; without keys they draw from torch's generator."""

    def __init__(self) -> None:
        self._depths: list[SampleDropPath] = []
        self._dropouts: list[SampleDropout] = []
        # Of the former, then of the latter.
        self._salts = torch.empty(0, dtype=torch.int64)
        self._rates = torch.empty(0)
        """Of the former."""

    def attach(self, model: nn.Module) -> None:
        """Put the layers of `model` that drop anything on this."""
        for module in model.modules():
            # Fused attention would draw its dropout itself, for all of the micro batch.
            if getattr(module, "fused_attn", False) and getattr(getattr(module, "attn_drop", None), "p", 0) > 0:
                module.fused_attn = False  # type: ignore[assignment]
        depths, dropouts = [], []
        for parent, child, name in list(_droppers(model)):
            module, salt = getattr(parent, child), _salt(name)
            made: SampleDropout | SampleDropPath
            if isinstance(module, DropPath):
                made = SampleDropPath(module)
                self._depths.append(made)
                depths.append(salt)
            else:
                made = SampleDropout(module)
                self._dropouts.append(made)
                dropouts.append(salt)
            setattr(parent, child, made.train(module.training))
        self._salts = torch.tensor([*depths, *dropouts], dtype=torch.int64)
        self._rates = torch.tensor([layer.drop_prob for layer in self._depths])

    def begin(self, keys: Tensor) -> None:
        """The samples of the next forward and its backward; (B,) int64 on the model's device."""
        if not len(self._salts):
            return
        if self._salts.device != keys.device:
            self._salts, self._rates = self._salts.to(keys.device), self._rates.to(keys.device)
        # All at once: a draw is a dozen small kernels, and a backbone has dozens of these layers.
        drawn = mix(keys ^ self._salts.unsqueeze(1))  # (layers, B)
        depths = len(self._depths)
        kept = _kept(drawn[:depths], self._rates.unsqueeze(1))
        paths = kept / (1 - self._rates).unsqueeze(1)
        for layer, path in zip(self._depths, paths.unbind(), strict=True):
            layer.path = path
        for dropout, own in zip(self._dropouts, drawn[depths:].unbind(), strict=True):
            dropout.keys = own

    def end(self) -> None:
        """No samples any more."""
        for layer in self._depths:
            layer.path = None
        for dropout in self._dropouts:
            dropout.keys = None


def _salt(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _droppers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Parent, name in it, and full name of every layer that drops elements or paths."""
    for path, parent in model.named_modules():
        for child, module in parent.named_children():
            elements = type(module) is nn.Dropout and module.p > 0
            if elements or (type(module) is DropPath and module.drop_prob > 0 and module.scale_by_keep):
                yield parent, child, f"{path}.{child}"


class SampleDropout(nn.Dropout):
    """Dropout by sample: (n · B, …) → the same, `n` rows in a row for each sample, such as a Swin's windows.

    Attributes:
        keys: (B,) int64, what each sample's elements follow from; `Noise` sets it.
    """

    keys: Tensor | None

    def __init__(self, like: nn.Dropout) -> None:
        super().__init__(like.p)
        self.keys = None

    def forward(self, input: Tensor) -> Tensor:
        """Any float (n · B, …), elements dropped in training."""
        keys = self.keys
        if not self.training or self.p == 0:
            return input
        if keys is None or len(input) % len(keys):
            return F.dropout(input, self.p)
        each = input.numel() // len(keys)
        places = torch.arange(each, device=input.device) * _GOLDEN
        kept = _kept(mix(keys.unsqueeze(1) + places), self.p)  # (B, elements of a sample)
        scale = 1 / (1 - self.p) if self.p < 1 else 0.0
        return input * (kept.view(input.shape) * scale).to(input.dtype)


class SampleDropPath(DropPath):
    """Stochastic depth by sample (Huang et al. 2016): (B, …) → the same, with whole samples dropped in training.

    Attributes:
        path: (B,) fp32, 0 where a sample skips this layer, else what makes up for the skipping; `Noise` sets it.
    """

    path: Tensor | None

    def __init__(self, like: DropPath) -> None:
        super().__init__(like.drop_prob, like.scale_by_keep)
        self.path = None

    def forward(self, x: Tensor) -> Tensor:
        """Any float (B, …)."""
        path = self.path
        if not self.training or path is None or len(path) != len(x):
            dropped: Tensor = super().forward(x)
            return dropped
        return x * path.to(x.dtype).view(-1, *(1 for _ in x.shape[1:]))
