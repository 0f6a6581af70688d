"""DeepSpeed's settings: sized to the model, unless the launch file says otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hybrid_dist.distributed.tuning import FEWEST_IN_A_BUCKET, MOST_IN_A_BUCKET, fill_in, tuned
from tests.conftest import ROOT, launch


def test_what_the_launch_file_says_stands() -> None:
    """Catches: a setting of the user's that is overwritten, an `auto` that is not; memory pinned without a GPU."""
    zero: dict[str, Any] = {
        "stage": 3, "reduce_bucket_size": 7, "allgather_bucket_size": "auto", "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu", "pin_memory": False}, "stage3_max_live_parameters": "auto",
    }  # fmt: skip
    fill_in(zero, tuned(3, [150, 50], 1_000_000), cuda=True)
    assert zero["reduce_bucket_size"] == 7
    assert zero["allgather_bucket_size"] == FEWEST_IN_A_BUCKET
    assert zero["offload_optimizer"]["pin_memory"] is True
    assert zero["offload_param"]["pin_memory"] is False
    assert zero["stage3_max_live_parameters"] == 250_000
    without = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    fill_in(without, tuned(2, [150, 50], 400), cuda=False)
    assert "overlap_comm" not in without
    assert without["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert without["offload_param"] == {"device": "none"}


@given(st.integers(1, 3), st.lists(st.integers(1, 40_000_000), max_size=60), st.integers(0, 2_000_000_000))
def test_sizes_follow_the_model(stage: int, trainable: list[int], frozen: int) -> None:
    """Catches: one bucket for all gradients of a large model; buckets of nothing, or smaller than a gradient, or of an
    odd number of weights, with which DeepSpeed does not start; ZeRO 3 that keeps a model whole."""
    total, largest = sum(trainable) + frozen, max(trainable, default=0)
    values = tuned(stage, trainable, total)
    bucket = values["reduce_bucket_size"]
    assert max(FEWEST_IN_A_BUCKET, largest) <= bucket <= max(MOST_IN_A_BUCKET, largest)
    assert values["allgather_bucket_size"] % 2 == 0
    assert bucket <= values["allgather_bucket_size"] <= bucket + 1
    if sum(trainable) > 8 * max(FEWEST_IN_A_BUCKET, largest):
        assert bucket * 8 <= sum(trainable)
    if stage == 3 and total > 4 * FEWEST_IN_A_BUCKET:
        assert values["stage3_max_live_parameters"] <= total / 4
    assert ("stage3_max_live_parameters" in values) == (stage == 3)


def test_a_json_of_ones_own(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    """Catches: a launch file with a DeepSpeed JSON that does not start, though the launch files say so; a traceback
    where it contradicts itself."""
    config = tiny_config(phases=[{"name": "a", "trainable": ["all"], "steps": 2, "lr": 1e-3}])
    zero = {"stage": 2, "reduce_bucket_size": 50_000}
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    text = (ROOT / "launch" / "accelerate" / "zero2.yaml").read_text().partition("deepspeed_config:\n")[0]
    text += f"deepspeed_config:\n  deepspeed_config_file: {tmp_path / 'own.json'}\n"
    own = tmp_path / "own.yaml"
    own.write_text(text)
    done = launch("--config", str(config), config_file=str(own), check=False)
    assert done.returncode != 0
    assert "train.py: the launch file: When using `deepspeed_config_file`" in done.stderr
    own.write_text(text.replace("mixed_precision: 'no'\n", ""))
    done = launch("--config", str(config), config_file=str(own))
    assert "on ZeRO 2 × 2" in done.stderr
