"""Layers for a CPU, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import GroupNorm
from torch import Tensor, nn

from hybrid_dist.model.on_cpu import Contiguous, DepthwiseConv2d, hasten


def gradients(conv: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = conv(x)
    (made.float() * torch.linspace(-1, 1, made.numel()).view(made.shape)).sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in conv.parameters())]
    assert all(grad is not None for grad in grads)
    return [made.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16)])
@pytest.mark.parametrize(("kernel", "bias"), [(7, True), (5, False)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_torchs(size: tuple[int, int], kernel: int, bias: bool, layout: torch.memory_format) -> None:
    """Catches: a kernel that is flipped or shifted, channels or samples that are mixed up, sums in 16 bits."""
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, kernel, padding=kernel // 2, groups=6, bias=bias)
    fast = copy.deepcopy(plain)
    hasten(fast)
    assert type(fast) is DepthwiseConv2d and type(plain) is nn.Conv2d
    x = torch.randn(4, 6, *size).to(memory_format=layout)
    exact = gradients(plain, x, False)
    for want, have in zip(exact, gradients(fast, x, False), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    plain.zero_grad()
    fast.zero_grad()
    for true, want, have in zip(exact, gradients(plain, x, True), gradients(fast, x, True), strict=True):
        assert have.dtype == want.dtype
        assert (have.float() - true).abs().max() < 0.01 * true.abs().max().clamp(min=1)
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))


def test_others_stay() -> None:
    """Catches: a convolution of another kind that is taken for one of these."""
    others = [
        nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 6, 7, padding=3),
        nn.Conv2d(6, 12, 7, padding=3, groups=6), nn.Conv2d(6, 6, 7, groups=6),
        nn.Conv2d(6, 6, 7, stride=2, padding=3, groups=6), nn.Conv2d(6, 6, 5, padding=4, dilation=2, groups=6),
        nn.Conv2d(6, 6, 7, padding=3, groups=6, padding_mode="circular"),
    ]  # fmt: skip
    hasten(nn.Sequential(*others))
    assert {type(conv) for conv in others} == {nn.Conv2d}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [nn.GroupNorm, GroupNorm])
def test_narrow_norms_are_torchs(kind: type[nn.GroupNorm], layout: torch.memory_format) -> None:
    """Catches: groups that are other channels; another kind of norm; a second phase that does it all again."""
    torch.manual_seed(0)
    plain = kind(num_channels=32, num_groups=8)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    fast = copy.deepcopy(plain)
    hasten(fast)
    once = type(fast)
    assert issubclass(once, Contiguous) and issubclass(once, kind) and type(plain) is kind
    hasten(fast)
    assert type(fast) is once
    x = torch.randn(4, 32, 5, 6).bfloat16().to(memory_format=layout)
    assert fast(x).is_contiguous()
    assert fast(x.float()).is_contiguous()
    exact = gradients(plain, x.float(), False)
    for want, have in zip(exact, gradients(fast, x.float(), False), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    plain.zero_grad()
    fast.zero_grad()
    for true, want, have in zip(exact, gradients(plain, x, False), gradients(fast, x, False), strict=True):
        assert have.dtype == want.dtype
        assert (have.float() - true).abs().max() < 0.01 * true.abs().max()


def test_wide_norms_stay() -> None:
    """Catches copies where torch is as quick without."""
    norms = [nn.GroupNorm(2, 32), nn.GroupNorm(1, 16), nn.LayerNorm(8)]
    hasten(nn.Sequential(*norms))
    assert [type(norm) for norm in norms] == [nn.GroupNorm, nn.GroupNorm, nn.LayerNorm]
