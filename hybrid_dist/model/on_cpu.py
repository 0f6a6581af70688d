"""Layers that a CPU's libraries are slow at: depthwise convolutions' gradients, norms of narrow groups."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 5
"""Kernels narrower than this are no slower with the library's own gradient."""
NARROW = 16
"""Groups of fewer channels than this are what torch is slow at."""


class _Depthwise(torch.autograd.Function):
    """Stride 1, padded to keep the size; its gradients are convolutions again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = F.conv2d(grad, weight.flip(2, 3), padding=ctx.padding, groups=len(weight))
        if ctx.needs_input_grad[1]:
            # Each channel of each sample is a channel here, with its own gradient as the kernel that is laid on it.
            batch, channels, *size = x.shape
            kernels = grad.reshape(batch * channels, 1, *size)
            each = F.conv2d(x.reshape(1, -1, *size), kernels, padding=ctx.padding, groups=len(kernels))
            each = each.view(batch, channels, 1, *each.shape[2:])
            of_weight = each.sum(0, dtype=torch.float32).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 2, 3))
        return of_x, of_weight, of_bias, None


class DepthwiseConv2d(nn.Conv2d):
    """(B, C, H, W) → the same shape, a kernel for each channel: as nn.Conv2d has it, but for the time of its backward.

    oneDNN's gradient of a 7 × 7 depthwise kernel takes ten times as long as the forward pass, which has as much to do.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any float (B, C, H, W), or what autocast makes of it."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(input)
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = bias.to(dtype) if bias is not None else None
        made: Tensor = _Depthwise.apply(input, weight, bias, self.padding)
        return made


class Contiguous(nn.Module):
    """To stand before a layer's class: the layer gets its input channel by channel in memory.

    Torch goes through a channels-last map in runs of a group's channels. A norm of 32 channels in 32 groups, forward
    and backward, takes 10 to 24 ms like that where 1 would do. What follows stays channel by channel.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) in any memory format → as the layer has it."""
        made: Tensor = super().forward(input.contiguous())
        return made


def hasten(model: nn.Module) -> None:
    """Make layers of the model quick on a CPU, in place, where they can be: what they give stays the same."""
    for module in model.modules():
        if type(module) is nn.Conv2d and _fits(module):
            module.__class__ = DepthwiseConv2d  # parameters, names and hooks stay
        elif isinstance(module, nn.GroupNorm) and not isinstance(module, Contiguous) and _is_narrow(module):
            module.__class__ = _contiguous(type(module))  # type: ignore[assignment, arg-type]


def _is_narrow(norm: nn.GroupNorm) -> bool:
    return norm.num_channels // norm.num_groups < NARROW


@cache
def _contiguous(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Contiguous{cls.__name__}", (Contiguous, cls), {})


def _fits(conv: nn.Conv2d) -> bool:
    same = all(size % 2 and size >= LEAST for size in conv.kernel_size)
    same = same and conv.padding == tuple(size // 2 for size in conv.kernel_size) and conv.padding_mode == "zeros"
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1)
    return same and plain and conv.in_channels == conv.out_channels == conv.groups
