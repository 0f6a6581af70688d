"""FLOPs that a picture takes in a phase: here, or in a process of its own, which nothing else has to wait for."""

from __future__ import annotations

import json
import os
import sys

from hybrid_dist.config import Config, PhaseConfig, parse_config
from hybrid_dist.plan.activations import timeline
from hybrid_dist.plan.fake import FakeModel


def flops_per_picture(config: Config, classes: dict[str, int], phase: PhaseConfig) -> tuple[float, float]:
    """The model's, forward and backward, as it trains in the phase: what is frozen has no backward.

    A multiplication and an addition are two. Nothing is computed, and no random state is touched.

    Args:
        classes: How many each classification task has.

    Raises:
        UserError: as `FakeModel`, or the model does other operations for more pictures.
    """
    fake = FakeModel(config, classes, config.size(phase))
    fake.train(phase)
    return timeline(fake, config.train.precision, "cuda", uncast_linear=False).work.flops_per_sample()


def main() -> int:
    """Read a config's values and the numbers of classes from standard input; a line of JSON for each phase."""
    os.nice(10)
    asked = json.load(sys.stdin)
    config = parse_config(asked["config"], "the run's config")
    for phase in config.phases:
        print(json.dumps([phase.name, sum(flops_per_picture(config, asked["classes"], phase))]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
