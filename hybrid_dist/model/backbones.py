"""timm backbones as feature extractors, whatever their layout: one convention out, uint8 pictures in."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg, group_parameters, split_model_name_tag
from torch import Tensor, nn

from hybrid_dist.config import BranchConfig
from hybrid_dist.errors import UserError
from hybrid_dist.model.weights import resolve_cfg
from hybrid_dist.model.windows import Stages, as_kwarg, fit_windows, is_windowed

# What would go round the weights policy or take away what a branch gives.
RESERVED_KWARGS = {
    "pretrained": "weights says where weights come from",
    "checkpoint_path": "weights says where weights come from",
    "cache_dir": "HF_HOME says where the cache is",
    "num_classes": "each task has its own head",
    "features_only": "the branch gives the last feature map and the pooled features",
}


KINDS_OF_BLOCKS = 64
"""So many of one class are compiled before the rest runs as it is."""


class Features(NamedTuple):
    """What a branch gives."""

    pooled: Tensor
    """(B, C): timm's own pooling and final norm."""
    tokens: Tensor
    """(B, N, D): the last feature map, row by row, without class tokens. D is C in most backbones."""


class Backbone(nn.Module):
    """A timm model without its classifier, with its own normalisation.

    Batch norms stay in eval mode: batch statistics would make the result depend on the micro batch.

    Attributes:
        net: the timm model.
        width: C, of the pooled features.
        token_width: D, of the last feature map.
        image_size: side in pixels of the pictures that it is built for.
        frozen: nothing in it trains; it then runs in eval mode and without a graph. Set by `Hybrid.set_trainable`.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, part: str, config: BranchConfig, image_size: int) -> None:
        """Build with random weights; `part` (cnn, transformer) names the branch in messages.

        Raises:
            UserError: timm doesn't know the name, refuses the kwargs, or the backbone can't take pictures of this size.
        """
        super().__init__()
        self.width, self.token_width = probe(part, config, image_size)
        self.image_size = image_size
        self.net = _create(part, config, image_size)
        # Not persistent: they follow from the backbone's name, a checkpoint holds what was learned.
        for name in ("mean", "std", "scale", "shift"):
            self.register_buffer(name, torch.empty(1, 3, 1, 1), persistent=False)
        self.normalise_by(**normalisation(config))
        self.frozen = False
        self.train()

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take other values, by channel, of pixels in 0–1, than timm's."""
        self.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
        self.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
        self.scale.copy_(1 / (255 * self.std))
        self.shift.copy_(-self.mean / self.std)

    def forward(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W), RGB → pooled (B, C) and tokens (B, N, D)."""
        if self.frozen:
            with torch.no_grad():
                return self._features(images)
        return self._features(images)

    def idle(self) -> None:
        """Run on a blank picture, for nothing: on other ranks it runs for something, and ZeRO 3 gathers weights that no
        rank has alone."""
        self(torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=self.mean.device))

    def _features(self, images: Tensor) -> Features:
        if images.dtype != torch.uint8:
            raise ValueError(f"pictures are uint8, 0 to 255, got {images.dtype}")
        return extract(self.net, self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → (images / 255 − mean) / std, fp32, in one pass over the pixels."""
        return torch.addcmul(self.shift, images.float(), self.scale)

    def train(self, mode: bool = True) -> Backbone:
        """As for any module, except that a frozen branch and batch norms stay in eval mode."""
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def checkpoint_activations(self, enable: bool) -> None:
        """Keep the blocks' inputs alone for the backward pass.

        Raises:
            UserError: timm can't do it for this backbone.
        """
        try:
            self.net.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):
            if enable:
                name = type(self.net).__name__
                raise UserError(f"train.checkpoint_activations: timm can't do it for {name}; [] would do") from None

    def compile_blocks(self) -> None:
        """Have each of the repeated blocks compiled at its first use, in place; blocks that are alike share the result.

        Raises:
            UserError: there are none.
        """
        # By stage, with stochastic depth or without, training or not: more kinds than dynamo allows for by default.
        torch._dynamo.config.recompile_limit = max(KINDS_OF_BLOCKS, torch._dynamo.config.recompile_limit)
        lists = [module for name, module in self.net.named_modules() if name.rpartition(".")[2] == "blocks"]
        blocks = [block for each in lists for block in each.children()]
        if not blocks:
            raise UserError(f"train.compile: {type(self.net).__name__} has no repeated blocks; false would do")
        for block in blocks:
            block.compile(dynamic=False)

    def no_weight_decay(self) -> set[str]:
        """Parameters, as named in this module, that timm keeps from weight decay."""
        listed: set[str] = getattr(self.net, "no_weight_decay", set)()
        return {f"net.{name}" for name in listed}

    def layers(self) -> dict[str, int]:
        """Which layer each parameter, as named in this module, belongs to: timm's own grouping, from 0 at the pictures.

        Raises:
            UserError: timm doesn't know this backbone's layers.
        """
        if not hasattr(self.net, "group_matcher"):
            raise UserError(f"timm doesn't know the layers of {type(self.net).__name__}; null would do")
        found = group_parameters(self.net, self.net.group_matcher(coarse=False), reverse=True)
        return {f"net.{name}": layer for name, layer in found.items()}


def extract(net: Any, images: Tensor) -> Features:
    """Run a timm model up to its classifier: float (B, 3, H, W), normalised → pooled (B, C) and tokens (B, N, D)."""
    return arrange(net, net.forward_features(images))


def arrange(net: Any, features: Any) -> Features:
    """What a timm model's last feature map gives, whatever its layout."""
    pooled = net.forward_head(features, pre_logits=True)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4) or pooled.ndim != 2:
        raise ValueError("it doesn't give one feature map and one pooled vector")
    if features.ndim == 3:  # (B, prefix + N, D): class and register tokens stand before the map
        tokens = features[:, getattr(net, "num_prefix_tokens", 0) :]
    elif getattr(net, "output_fmt", "NCHW") == "NHWC":
        tokens = features.flatten(1, 2)  # (B, H, W, D) → (B, H·W, D)
    else:
        tokens = features.flatten(2).transpose(1, 2)  # (B, D, H, W) → (B, H·W, D)
    return Features(pooled, tokens)


def probe(part: str, config: BranchConfig, image_size: int) -> tuple[int, int]:
    """The widths of a backbone's pooled features and tokens, found on the meta device: no memory, no arithmetic.

    Raises:
        UserError: as `Backbone`.
    """
    with torch.device("meta"), torch.no_grad():
        net = _create(part, config, image_size).eval()
        try:
            features = extract(net, torch.zeros(1, 3, image_size, image_size))
        except Exception as error:  # timm asserts, raises, or fails in some layer, by family
            size = config.kwargs.get("img_size") or resolve_cfg(config).input_size[-1]
            raise UserError(
                f"model.{part}: {config.name} can't take pictures of {image_size} pixels "
                f"({_reason(error)}); set data.image_size to its own {size}"
                + (f", or leave img_size out of model.{part}.kwargs" if "img_size" in config.kwargs else "")
            ) from error
    return features.pooled.shape[1], features.tokens.shape[2]


def normalisation(config: BranchConfig) -> dict[str, list[float]]:
    """`mean` and `std` by channel, of pixels in 0–1, that timm says the backbone wants."""
    cfg = resolve_cfg(config)
    return {"mean": list(cfg.mean), "std": list(cfg.std)}


def pretrained_licence(config: BranchConfig) -> str | None:
    """The licence of the hub's weights, as far as timm knows it."""
    licence: str | None = getattr(resolve_cfg(config), "license", None)
    return licence


def sized_kwargs(part: str, config: BranchConfig, image_size: int) -> dict[str, Any]:
    """The kwargs with the picture's size, where the model takes one, and a Swin's windows, where its own don't fit it.

    Raises:
        UserError: timm refuses the kwargs, or the backbone can't take pictures of this size.
    """
    if not resolve_cfg(config).fixed_input_size:  # timm's sign that it does not
        return dict(config.kwargs)
    kwargs = {"img_size": image_size, **config.kwargs}
    if not is_windowed(config.name) or not isinstance(kwargs["img_size"], int):
        return kwargs
    stages = _stages(part, config.model_dump_json())
    # Windows that the config names are for no size in particular.
    scale = 1.0 if "window_size" in config.kwargs else kwargs["img_size"] / resolve_cfg(config).input_size[-1]
    try:
        windows = fit_windows(stages, kwargs["img_size"], scale)
    except UserError as error:
        raise UserError(
            f"model.{part}: {config.name} can't take pictures of {kwargs['img_size']} pixels: {error}"
        ) from None
    return kwargs if windows == stages.windows else {**kwargs, "window_size": as_kwarg(windows)}


@lru_cache(maxsize=64)
def _stages(part: str, config_json: str) -> Stages:
    """Kept: each build of a Swin asks several times."""
    config = BranchConfig.model_validate_json(config_json)
    with torch.device("meta"):
        return Stages.of(_timm(part, config.name, {**config.kwargs, "always_partition": True}))


def _create(part: str, config: BranchConfig, image_size: int) -> Any:
    """timm's model, with random weights and no classifier."""
    check_name(part, config.name)
    for name in RESERVED_KWARGS:
        if name in config.kwargs:
            raise UserError(f"model.{part}.kwargs.{name}: not to be set here; {RESERVED_KWARGS[name]}")
    if config.kwargs.get("in_chans", 3) != 3:
        raise UserError(f"model.{part}.kwargs.in_chans: pictures have 3 channels, got {config.kwargs['in_chans']}")
    return _timm(part, config.name, sized_kwargs(part, config, image_size))


def _timm(part: str, name: str, kwargs: dict[str, Any]) -> Any:
    kwargs = {key: _tuples(value) for key, value in kwargs.items()}
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
    except Exception as error:  # what timm and its layers raise for a bad argument has no common class
        raise UserError(
            f"model.{part}: timm can't build {name} with "
            f"{', '.join(f'{key}={value!r}' for key, value in kwargs.items()) or 'its defaults'}: "
            f"{_reason(error)}; look at model.{part}.kwargs and data.image_size"
        ) from error


def check_name(part: str, name: str) -> None:
    """Refuse a name or pretrained tag that timm doesn't know.

    Raises:
        UserError: names the closest that it knows.
    """
    if not timm.is_model(name):
        known = timm.list_models() + (timm.list_pretrained() if "." in name else [])
        near = difflib.get_close_matches(name, known, n=3)
        raise UserError(
            f"model.{part}.name: timm has no {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names those it has")
        )
    try:
        get_pretrained_cfg(name)
    except RuntimeError:
        architecture, tag = split_model_name_tag(name)
        tagged = timm.list_pretrained(f"{architecture}.*")
        raise UserError(
            f"model.{part}.name: {architecture} has no pretrained tag {tag!r}; it has {', '.join(tagged) or 'none'}"
        ) from None


def _tuples(value: Any) -> Any:
    """YAML gives lists where timm compares with tuples."""
    if isinstance(value, list):
        return tuple(_tuples(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return value


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
