"""Each fusion against its formula, written out again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybrid_dist.errors import UserError
from hybrid_dist.model.fusion import FUSIONS, build_fusion

WIDTHS, TOKEN_WIDTHS = (6, 10), (6, 10)


def features(widths=WIDTHS, token_widths=TOKEN_WIDTHS, places=(4, 9)):
    generator = torch.Generator().manual_seed(3)
    pooled = [torch.randn(5, width, generator=generator) for width in widths]
    tokens = [torch.randn(5, n, width, generator=generator) for n, width in zip(places, token_widths, strict=True)]
    return pooled, tokens


def shaken(name, widths=WIDTHS, token_widths=TOKEN_WIDTHS):
    """A fusion with no parameter at its special start."""
    torch.manual_seed(4)
    fusion = build_fusion(name, widths, token_widths)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fusion


def test_unknown_name_lists_the_known():
    """Catches a KeyError for a typo in the config."""
    with pytest.raises(UserError, match=r"model\.fusion.*'concatt'.*add, attention, concat, cross_attention, gated"):
        build_fusion("concatt", WIDTHS, TOKEN_WIDTHS)


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_width_is_what_it_says_and_all_parameters_learn(name):
    """Catches a wrong out_features, in-place changes, and parameters that DDP would wait for in vain."""
    fusion = shaken(name)
    pooled, tokens = features()
    copies = [tensor.clone() for tensor in pooled + tokens]
    out = fusion(pooled, tokens)
    assert out.shape == (5, fusion.out_features)
    if list(fusion.parameters()):
        out.square().sum().backward()
        # A constant added to every key changes no softmax: that bias has a gradient, and it is zero.
        assert all(p.grad is not None for p in fusion.parameters())
        assert all(p.grad.abs().sum() > 0 for name, p in fusion.named_parameters() if not name.endswith("key.bias"))
    assert all(torch.equal(a, b) for a, b in zip(copies, pooled + tokens, strict=True))


@pytest.mark.parametrize("name", ["attention", "gated"])
def test_starts_as_the_mean_of_both(name):
    """Catches a start that prefers a branch before anything is learned."""
    pooled, tokens = features((8, 8), (8, 8))
    torch.testing.assert_close(build_fusion(name, (8, 8), (8, 8))(pooled, tokens), (pooled[0] + pooled[1]) / 2)


def test_cross_attention_starts_as_concat():
    """Catches noise added to pretrained features at the start."""
    pooled, tokens = features()
    assert torch.equal(build_fusion("cross_attention", WIDTHS, TOKEN_WIDTHS)(pooled, tokens), torch.cat(pooled, 1))


def test_concat_and_single():
    """Catches an order that differs from the branches', and parameters where there should be none."""
    pooled, tokens = features()
    concat = build_fusion("concat", WIDTHS, TOKEN_WIDTHS)
    assert torch.equal(concat(pooled, tokens), torch.cat([pooled[0], pooled[1]], 1))
    single = build_fusion("gated", (6,), (6,))
    assert single(pooled[:1], tokens[:1]) is pooled[0] and single.out_features == 6
    assert not list(concat.parameters()) and not list(single.parameters())


def test_add():
    """Catches a projection on the wrong side, one where none is needed, or one that changes lengths at the start."""
    pooled, tokens = features()
    fusion = build_fusion("add", WIDTHS, TOKEN_WIDTHS)
    weight, bias = dict(fusion.named_parameters()).values()
    torch.testing.assert_close(fusion(pooled, tokens), pooled[0] @ weight.T + bias + pooled[1])
    torch.testing.assert_close((pooled[0] @ weight.T).norm(dim=1), pooled[0].norm(dim=1))
    assert not list(build_fusion("add", (6, 6), (6, 6)).parameters())


def test_attention():
    """Catches weights that don't sum to one over the branches, or are swapped."""
    pooled, tokens = features((8, 8), (8, 8))
    fusion = shaken("attention", (8, 8), (8, 8))
    scores = []
    for vector, (up, _, down) in zip(pooled, fusion.scorers, strict=True):
        scores.append(torch.tanh(vector @ up.weight.T + up.bias) @ down.weight.T + down.bias)
    first = scores[0].exp() / (scores[0].exp() + scores[1].exp())
    torch.testing.assert_close(fusion(pooled, tokens), first * pooled[0] + (1 - first) * pooled[1])


def test_gated():
    """Catches a gate per picture instead of per channel, or one turned round."""
    pooled, tokens = features((8, 8), (8, 8))
    fusion = shaken("gated", (8, 8), (8, 8))
    gate = 1 / (1 + torch.exp(-(torch.cat(pooled, 1) @ fusion.gate.weight.T + fusion.gate.bias)))
    torch.testing.assert_close(fusion(pooled, tokens), gate * pooled[0] + (1 - gate) * pooled[1])


@pytest.mark.parametrize("widths", [(6, 10), (128, 192)], ids=["one head", "two heads"])
def test_cross_attention(widths):
    """Catches heads mixed up, a missing scale or norm, attention to oneself, and the mean over the wrong axis."""
    pooled, tokens = features((7, 11), widths)
    fusion = shaken("cross_attention", (7, 11), widths)
    expected = []
    for block, own, (asking, asked) in [(fusion.first, pooled[0], tokens), (fusion.second, pooled[1], tokens[::-1])]:
        normed = [
            nn.functional.layer_norm(t, t.shape[-1:], n.weight, n.bias)
            for t, n in [(asking, block.norm_asking), (asked, block.norm_asked)]
        ]
        q = normed[0] @ block.query.weight.T + block.query.bias
        k, v = (normed[1] @ linear.weight.T + linear.bias for linear in (block.key, block.value))
        mixed = []
        for start in range(0, q.shape[-1], 64):
            columns = slice(start, start + 64)
            weights = torch.softmax(q[..., columns] @ k[..., columns].transpose(1, 2) / 8, dim=-1)
            mixed.append(weights @ v[..., columns])
        everywhere = torch.cat(mixed, -1) @ block.out.weight.T + block.out.bias  # (B, N, out), each place of its own
        expected.append(own + everywhere.mean(dim=1))
    torch.testing.assert_close(fusion(pooled, tokens), torch.cat(expected, 1), atol=1e-4, rtol=1e-4)
