"""Where each branch looked: how much each place of its last feature map spoke for an answer."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hybrid_dist.inference.opened import OpenedModel
from hybrid_dist.model.backbones import arrange

_WARM = cv2.COLORMAP_INFERNO
_STRENGTH = 0.7


def looks(opened: OpenedModel, images: Tensor, task: str, chosen: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
    """Grad-CAM (Selvaraju et al., ICCV 2017) of each branch's last feature map, Swin's as well as the CNN's.

    A place counts by its features, weighted by how the answer would follow them. For a class only what speaks for it
    is kept; for a score, what raises and what lowers it.

    Args:
        images: uint8 (B, 3, S, S), RGB, as the model sees them.
        chosen: (B,) the classes that are asked about; None for a score.

    Returns:
        Branch → (B, h, w) float32 in 0–1, the strongest place of each picture at 1, or all 0.
    """
    model, branches = opened.model, opened.model.branches()
    images = images.to(opened.device)
    with torch.no_grad():
        maps = {part: branch.net.forward_features(branch.normalise(images)) for part, branch in branches.items()}
    with torch.enable_grad():
        for found in maps.values():
            found.requires_grad_()
        fused = model.fuse({part: arrange(branch.net, maps[part]) for part, branch in branches.items()})
        answer = model.answer(fused)[task]
        if chosen is not None:
            answer = answer.gather(1, torch.from_numpy(chosen).to(answer.device)[:, None])
        gradients = torch.autograd.grad(answer.sum(), list(maps.values()))
    out = {}
    for (part, features), gradient in zip(maps.items(), gradients, strict=True):
        net = branches[part].net
        weight = _grid(net, gradient).mean((2, 3), keepdim=True)
        heat = (weight * _grid(net, features.detach())).sum(1)  # (B, h, w)
        heat = heat.abs() if chosen is None else heat.relu()
        most = heat.amax((1, 2), keepdim=True)
        out[part] = (heat / most.clamp(min=1e-12)).float().cpu().numpy()
    return out


def _grid(net: Any, features: Tensor) -> Tensor:
    """A timm model's feature map as (B, D, h, w)."""
    if features.ndim == 3:
        tokens = features[:, getattr(net, "num_prefix_tokens", 0) :]
        side = round(tokens.shape[1] ** 0.5)
        return tokens.transpose(1, 2).unflatten(2, (side, -1))
    return features.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else features


def overlay(picture: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The picture in grey under a warm glow: uint8 (S, S, 3), RGB, and (h, w) in 0–1 → uint8 (S, S, 3)."""
    size = (picture.shape[1], picture.shape[0])
    spread = np.clip(cv2.resize(heat, size, interpolation=cv2.INTER_CUBIC), 0, 1)
    warm = cv2.applyColorMap((spread * 255).astype(np.uint8), _WARM)[..., ::-1]
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    share = _STRENGTH * spread[..., None]
    return np.asarray(grey * (1 - share) + warm * share, np.uint8)
