"""A running mean of the weights, kept where the optimizer keeps the weights that it updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Average:
    """The exponential moving average of what this rank updates: under ZeRO its part, never a whole model.

    Polyak and Juditsky 1992 average over all steps; with weights that fall off exponentially it is as in Tarvainen and
    Valpola 2017 (arxiv.org/abs/1703.01780).
    """

    def __init__(self, weights: Iterable[Tensor]):
        """Begins at the present values of `weights`, the tensors that the optimizer updates; each may come again."""
        self._means = {weight: weight.detach().clone() for weight in dict.fromkeys(weights)}
        self.exchanged = False
        """Whether the means stand where the weights belong."""

    def of(self, weight: Tensor) -> Tensor | None:
        """The mean of one of the weights, in its shape; None for another tensor."""
        assert not self.exchanged
        return self._means.get(weight)

    @torch.no_grad()
    def update(self, decay: float, left_out: Tensor) -> None:
        """mean ← decay · mean + (1 − decay) · weight, without waiting for the device.

        Args:
            left_out: (), fp32 on the device: where it is 1, the means stay as they are.
        """
        assert not self.exchanged
        weights, means = list(self._means), list(self._means.values())
        if not means:  # of few small tensors a rank may own nothing
            return
        share = (1 - decay) * (1 - left_out).to(means[0].device)  # the host, where the optimizer is offloaded
        torch._foreach_lerp_(means, weights, [share] * len(means))

    @torch.no_grad()
    def exchange(self) -> None:
        """Means and weights change places; a second time, and both are what they were, to the bit."""
        for weight, mean in self._means.items():
            held = weight.detach().clone()  # one tensor at a time: a second copy of all is what would not fit
            weight.copy_(mean)
            mean.copy_(held)
        self.exchanged = not self.exchanged
