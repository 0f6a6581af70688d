"""How two branches' features become one. A new way is one class here, by `@register`, and its name in the config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybrid_dist.errors import UserError

HEAD_WIDTH = 64
MAX_ATTENTION_WIDTH = 512


class Fusion(nn.Module, ABC):
    """Base of all fusions.

    Attributes:
        out_features: width of what `forward` gives.
        plain: `forward` for somebody without this module, on a model's card: lines of torch that make `fused` of the
            branches' `pooled` (B, C), `maps`, their last feature maps as timm gives them, and `nets`, timm's models,
            with `weights` by name and `linear(name, x)`, a layer of them.
        reads_tokens: whether `forward` looks at the last feature maps; where not, anything may stand for them.
    """

    out_features: int
    plain: ClassVar[str]
    reads_tokens: ClassVar[bool] = False

    def __init__(self, widths: Sequence[int], token_widths: Sequence[int]) -> None:
        """`widths` of the branches' pooled features, `token_widths` of their feature maps, in the branches' order."""
        super().__init__()

    @abstractmethod
    def forward(self, pooled: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
        """Each branch's (B, C) and (B, N, D) → (B, out_features)."""


FUSIONS: dict[str, type[Fusion]] = {}
AnyFusion = TypeVar("AnyFusion", bound=type[Fusion])


def register(name: str) -> Callable[[AnyFusion], AnyFusion]:
    """Make a class available as `model.fusion: name`."""

    def add(cls: AnyFusion) -> AnyFusion:
        assert name not in FUSIONS, name
        FUSIONS[name] = cls
        return cls

    return add


def find_fusion(name: str) -> type[Fusion]:
    """The class behind `model.fusion: name`.

    Raises:
        UserError: there is none; lists those that there are.
    """
    if name not in FUSIONS:
        raise UserError(f"model.fusion: there is no {name!r}; there is {', '.join(sorted(FUSIONS))}")
    return FUSIONS[name]


def build_fusion(name: str, widths: Sequence[int], token_widths: Sequence[int]) -> Fusion:
    """The fusion called `name`, as `fusion_class` has it.

    Raises:
        UserError: there is no such fusion.
    """
    return fusion_class(name, len(widths))(widths, token_widths)


def fusion_class(name: str, branches: int) -> type[Fusion]:
    """The class for so many branches: with a single one there is nothing to fuse, whatever the name.

    Raises:
        UserError: there is no such fusion.
    """
    cls = find_fusion(name)
    return Single if branches == 1 else cls


class Single(Fusion):
    """A single branch's pooled features as they are: (B, C) → (B, C). No parameters."""

    plain = "fused = pooled[0]"

    def __init__(self, widths: Sequence[int], token_widths: Sequence[int]) -> None:
        super().__init__(widths, token_widths)
        (self.out_features,) = widths

    def forward(self, pooled: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
        """(B, C) → (B, C)."""
        return pooled[0]


@register("concat")
class Concat(Fusion):
    """Pooled features side by side: (B, C1), (B, C2) → (B, C1 + C2). No parameters."""

    plain = "fused = torch.cat(pooled, dim=1)"

    def __init__(self, widths: Sequence[int], token_widths: Sequence[int]) -> None:
        super().__init__(widths, token_widths)
        self.out_features = sum(widths)

    def forward(self, pooled: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
        """(B, C1), (B, C2) → (B, C1 + C2)."""
        return torch.cat(list(pooled), dim=1)


_PROJECTED = """\
project = lambda i, x: linear(f"fusion.projections.{i}", x) if f"fusion.projections.{i}.weight" in weights else x
first, second = project(0, pooled[0]), project(1, pooled[1])
"""


class Projected(Fusion):
    """Base of the fusions that mix vectors of one width: the wider branch's, to which the narrower is projected."""

    def __init__(self, widths: Sequence[int], token_widths: Sequence[int]) -> None:
        super().__init__(widths, token_widths)
        self.out_features = max(widths)
        self.projections = nn.ModuleList(_projection(width, self.out_features) for width in widths)

    def project(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """(B, C1), (B, C2) → two of (B, max(C1, C2))."""
        return [projection(vector) for projection, vector in zip(self.projections, pooled, strict=True)]


@register("add")
class Add(Projected):
    """Sum of the pooled features, the narrower projected first: (B, C1), (B, C2) → (B, max(C1, C2)).

    No parameters where the widths are equal.
    """

    plain = _PROJECTED + "fused = first + second"

    def forward(self, pooled: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
        """(B, C1), (B, C2) → (B, max(C1, C2))."""
        first, second = self.project(pooled)
        return first + second


@register("attention")
class Attention(Projected):
    """Weighted mean of the branches, the two weights a softmax over scores of each picture's features.

    `w = softmax_i(v_i · tanh(U_i p_i))`, `out = Σ w_i p_i`, p_i the projected (B, C), w (B, 2): the additive
    attention of Bahdanau et al. 2015 (arXiv:1409.0473), used for pooling as in Ilse et al. 2018 (arXiv:1802.04712).
    Each branch has a scorer of its own, their features not being alike. v starts at zero: the plain mean.
    """

    plain = (
        _PROJECTED
        + """\
score = lambda i, x: linear(f"fusion.scorers.{i}.2", linear(f"fusion.scorers.{i}.0", x).tanh())
share = torch.cat([score(0, first), score(1, second)], dim=1).softmax(dim=1)
fused = share[:, :1] * first + share[:, 1:] * second"""
    )

    def __init__(self, widths: Sequence[int], token_widths: Sequence[int]) -> None:
        super().__init__(widths, token_widths)
        self.scorers = nn.ModuleList(_scorer(self.out_features) for _ in widths)

    def forward(self, pooled: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
        """(B, C1), (B, C2) → (B, max(C1, C2))."""
        projected = self.project(pooled)
        scores = torch.cat([scorer(vector) for scorer, vector in zip(self.scorers, projected, strict=True)], dim=1)
        weights = scores.float().softmax(dim=1)  # (B, 2), in fp32: bf16 has two digits
        return weights[:, :1] * projected[0] + weights[:, 1:] * projected[1]


@register("gated")
class Gated(Projected):
    """A gate for each channel decides between the branches.

    `z = sigmoid(W [p_1; p_2] + b)`, `out = z ⊙ p_1 + (1 - z) ⊙ p_2`, all (B, max(C1, C2)): the gated multimodal unit
    of Arevalo et al. 2017 (arXiv:1702.01992), on features that are normalised already, so without its tanh. W and b
    start at zero: the plain mean.
    """

    plain = (
        _PROJECTED
        + """\
gate = linear("fusion.gate", torch.cat([first, second], dim=1)).sigmoid()
fused = gate * first + (1 - gate) * second"""
    )

    def __init__(self, widths: Sequence[int], token_widths: Sequence[int]) -> None:
        super().__init__(widths, token_widths)
        self.gate = _zeroed(nn.Linear(2 * self.out_features, self.out_features))

    def forward(self, pooled: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
        """(B, C1), (B, C2) → (B, max(C1, C2))."""
        first, second = self.project(pooled)
        gate: Tensor = self.gate(torch.cat([first, second], dim=1)).float().sigmoid()
        return gate * first + (1 - gate) * second


class CrossAttend(nn.Module):
    """Pre-norm multi-head attention from one feature map to another, averaged over the asking map's places.

    `mean_n W_o softmax(q_n K^T / √d) V` with q, K, V linear in the normed tokens (Vaswani et al. 2017,
    arXiv:1706.03762). The mean is taken before W_o, which is linear: the same, cheaper. W_o starts at zero.
    """

    def __init__(self, asking: int, asked: int, out: int) -> None:
        super().__init__()
        self.heads = max(1, min(asking, asked, MAX_ATTENTION_WIDTH) // HEAD_WIDTH)
        inner = self.heads * HEAD_WIDTH
        self.norm_asking = nn.LayerNorm(asking)
        self.norm_asked = nn.LayerNorm(asked)
        self.query = _small(nn.Linear(asking, inner))
        self.key = _small(nn.Linear(asked, inner))
        self.value = _small(nn.Linear(asked, inner))
        self.out = _zeroed(nn.Linear(inner, out))

    def forward(self, asking: Tensor, asked: Tensor) -> Tensor:
        """(B, N, D1), (B, M, D2) → (B, out)."""
        asked = self.norm_asked(asked)
        query = self._split(self.query(self.norm_asking(asking)))
        mixed = F.scaled_dot_product_attention(query, self._split(self.key(asked)), self._split(self.value(asked)))
        found: Tensor = self.out(mixed.mean(dim=2).flatten(1))  # (B, heads, N, d) → (B, heads·d) → (B, out)
        return found

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, heads·d) → (B, heads, N, d)."""
        return tokens.reshape(*tokens.shape[:2], self.heads, -1).transpose(1, 2)


@register("cross_attention")
class CrossAttention(Fusion):
    """Each branch's feature map attends to the other's; what it finds is added to its pooled features.

    `out = [c_1 + a(t_1 → t_2); c_2 + a(t_2 → t_1)]`: (B, C1), (B, C2) → (B, C1 + C2), with `a` as in `CrossAttend` and
    t (B, N, D): the exchange of CrossViT (Chen et al. 2021, arXiv:2103.14899) between whole maps. As only the mean over
    places is used, adding to the pooled vector is the residual stream over tokens, pooled. Starts as `concat`.
    """

    reads_tokens = True
    plain = """\
def rows(net, x):  # → (B, N, D), without class tokens
    if x.ndim == 3:
        return x[:, getattr(net, "num_prefix_tokens", 0) :]
    return x.flatten(1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else x.flatten(2).transpose(1, 2)

def attend(name, asking, asked):
    given = lambda end: (weights[f"{name}.norm_{end}.{kind}"] for kind in ("weight", "bias"))
    norm = lambda end, x: F.layer_norm(x, x.shape[-1:], *given(end))
    split = lambda end, x: linear(f"{name}.{end}", x).unflatten(2, (-1, 64)).transpose(1, 2)
    asking, asked = norm("asking", asking), norm("asked", asked)
    found = F.scaled_dot_product_attention(split("query", asking), split("key", asked), split("value", asked))
    return linear(f"{name}.out", found.mean(dim=2).flatten(1))

tokens = [rows(net, x) for net, x in zip(nets, maps)]
first, second = attend("fusion.first", *tokens), attend("fusion.second", *reversed(tokens))
fused = torch.cat([pooled[0] + first, pooled[1] + second], dim=1)"""

    def __init__(self, widths: Sequence[int], token_widths: Sequence[int]) -> None:
        super().__init__(widths, token_widths)
        self.out_features = sum(widths)
        self.first = CrossAttend(token_widths[0], token_widths[1], widths[0])
        self.second = CrossAttend(token_widths[1], token_widths[0], widths[1])

    def forward(self, pooled: Sequence[Tensor], tokens: Sequence[Tensor]) -> Tensor:
        """(B, C1), (B, C2) and (B, N, D1), (B, M, D2) → (B, C1 + C2)."""
        first = pooled[0] + self.first(tokens[0], tokens[1])
        second = pooled[1] + self.second(tokens[1], tokens[0])
        return torch.cat([first, second], dim=1)


def _projection(width: int, out: int) -> nn.Module:
    if width == out:
        return nn.Identity()
    linear = nn.Linear(width, out)
    nn.init.orthogonal_(linear.weight)  # keeps lengths, so that no branch starts louder than the other
    nn.init.zeros_(linear.bias)
    return linear


def _scorer(width: int) -> nn.Sequential:
    hidden = max(1, width // 4)
    return nn.Sequential(_small(nn.Linear(width, hidden)), nn.Tanh(), _zeroed(nn.Linear(hidden, 1)))


def _small(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def _zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
