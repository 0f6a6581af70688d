"""How a device's autocast and ZeRO 3's linear layers differ from what the trace's CPU would do by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

# What CUDA's autocast runs in fp32; the CPU's leaves most of them in bf16. PyTorch's documentation of torch.amp lists
# them under "CUDA Ops that can autocast to float32".
_FUNCTIONS = (
    "acos", "asin", "cosh", "cumprod", "cumsum", "dist", "erfinv", "exp", "expm1", "group_norm", "layer_norm", "log",
    "log10", "log1p", "log2", "log_softmax", "norm", "pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "softmax",
    "sum", "tan", "cosine_similarity", "native_layer_norm", "native_group_norm", "__pow__", "__rpow__", "__rdiv__",
    "__rtruediv__", "cross_entropy", "kl_div", "l1_loss", "mse_loss", "nll_loss", "normalize", "rms_norm",
    "smooth_l1_loss", "softmin", "softplus", "binary_cross_entropy_with_logits",
)  # fmt: skip
FP32_ON_CUDA: frozenset[Callable[..., Any]] = frozenset(
    getattr(place, name) for place in (torch, Tensor, F) for name in _FUNCTIONS if hasattr(place, name)
)


class Policy(TorchFunctionMode):
    """Within it, functions run as they would in training.

    Args:
        fp32: Functions whose float inputs become fp32 first, while autocast is on.
        linear: What stands for `torch.nn.functional.linear`; None: itself.
    """

    def __init__(self, fp32: frozenset[Callable[..., Any]], linear: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.fp32 = fp32
        self.linear = linear

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and self.linear is not None:
            return self.linear(*args, **kwargs)
        if func in self.fp32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_fp32, (args, kwargs))
        return func(*args, **kwargs)


def _to_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


class SavesUncast(torch.autograd.Function):
    """A linear layer that keeps its input and weight as they come in, not as autocast makes them.

    ZeRO 3 puts such a one in the place of torch's, so that no copy of a weight outlives its layer. What a norm gives in
    fp32 is then kept in fp32.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(…, in) → (…, out)."""
        ctx.autocast = torch.is_autocast_enabled("cpu")
        ctx.save_for_backward(input, weight, bias)
        return F.linear(input, weight, bias) if input.dim() == 2 else _matmul(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of input, weight and bias."""
        (gradient,) = gradients
        input, weight, bias = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        with torch.autocast("cpu", dtype=torch.get_autocast_dtype("cpu"), enabled=ctx.autocast):
            rows = gradient.reshape(-1, gradient.shape[-1])  # (…, out) → (rows, out)
            of_input = gradient.matmul(weight) if wants_input else None
            of_weight = rows.t().matmul(input.reshape(-1, input.shape[-1])) if wants_weight else None
            of_bias = rows.sum(0) if bias is not None and wants_bias else None
        return of_input, of_weight, of_bias


def _matmul(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = input.matmul(weight.t())
    if bias is not None:
        output += bias
    return output


def saves_uncast(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`: (…, in) → (…, out)."""
    output: Tensor = SavesUncast.apply(input, weight, bias)
    return output
