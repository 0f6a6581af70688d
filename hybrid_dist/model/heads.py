"""From fused features to a task's answer. A new kind of task is one class here, by `@register`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN = 64
BALANCE = "/balance"
"""Among a model's outputs in training, beside its tasks: what `Balance` gives. No task is called so."""


class Head(nn.Module):
    """Base of all heads: (B, in_features) → the task's answer, fp32.

    Attributes:
        plain: `forward` for somebody without this module, on a model's card: an expression of `x` (B, in_features),
            with `linear(name, x)`, a layer of the weights' file, and `head`, what its layers' names begin with.
    """

    plain: ClassVar[str]

    def __init__(self, in_features: int, classes: int, dropout: float) -> None:
        """`classes` is the number of labels; kinds without labels ignore it."""
        super().__init__()
        self.dropout = nn.Dropout(dropout)


HEADS: dict[str, type[Head]] = {}
AnyHead = TypeVar("AnyHead", bound=type[Head])


def register(kind: str) -> Callable[[AnyHead], AnyHead]:
    """Make a class the head of tasks of this kind."""

    def add(cls: AnyHead) -> AnyHead:
        assert kind not in HEADS, kind
        HEADS[kind] = cls
        return cls

    return add


class Balance(nn.Module):
    """The logarithms of the tasks' variances, from which their weights in the loss follow: learned with the heads."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(tasks))

    def forward(self) -> Tensor:
        """(tasks,) fp32, in the config's order."""
        return self.log_variance + 0.0  # ZeRO 3 takes the parameter itself away again


class Linear32(nn.Linear):
    """A linear layer in fp32 under autocast too: any float (…, in) → fp32 (…, out).

    A head is a thousandth of the arithmetic, and bf16's two digits would make logits tie and scores step by 1/256.
    A class of its own, because DeepSpeed's autocast sends an `nn.Linear`'s weights round in bf16.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any float (…, in) → fp32 (…, out)."""
        device = input.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return F.linear(input.float(), self.weight.float(), self.bias.float())
        return F.linear(input.float(), self.weight.float(), self.bias.float())


@register("classification")
class Classification(Head):
    """Dropout and a linear layer: (B, in_features) → logits (B, classes), fp32."""

    plain = 'linear(f"{head}.linear", x)'

    def __init__(self, in_features: int, classes: int, dropout: float) -> None:
        super().__init__(in_features, classes, dropout)
        self.linear = _start(Linear32(in_features, classes))

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features) → (B, classes)."""
        logits: Tensor = self.linear(self.dropout(features))
        return logits


@register("regression")
class Regression(Head):
    """Dropout, 64 hidden units, a sigmoid: (B, in_features) → scores (B,) from 0 to 1, fp32. Starts near 0.5."""

    plain = 'linear(f"{head}.linear", linear(f"{head}.hidden", x).relu()).squeeze(1).sigmoid()'

    def __init__(self, in_features: int, classes: int, dropout: float) -> None:
        super().__init__(in_features, classes, dropout)
        self.hidden = Linear32(in_features, HIDDEN)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        nn.init.zeros_(self.hidden.bias)
        self.linear = _start(Linear32(HIDDEN, 1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, in_features) → (B,)."""
        hidden = self.hidden(self.dropout(features)).relu()  # (B, 64)
        scores: Tensor = self.linear(hidden).squeeze(1).sigmoid()
        return scores


def _start(linear: Linear32) -> Linear32:
    """Answers near zero at first: no class and no score is preferred before anything is learned."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
