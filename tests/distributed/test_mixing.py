"""What the recipe adds to data and losses, all of it at once: the same trajectory on every topology."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import launch, read_lines, tiny_values


def train(data: Path, folder: Path, config_file: str | None, micro: int) -> Path:
    values = tiny_values(data, folder)
    values["data"] |= {"balance": "airline", "mixup": 0.4, "cutmix": 1.0, "mix_prob": 0.6, "degrade": 0.5}
    values["tasks"]["type"] |= {"smoothing": 0.1, "tail": "logit_adjusted"}
    values["tasks"]["airline"] |= {"tail": "balanced"}
    values["phases"] = [values["phases"][2] | {"steps": 6}]
    values["train"]["micro_batch_size"] = micro
    YAML().dump(values, folder / "config.yaml")
    launch("--config", str(folder / "config.yaml"), config_file=config_file)
    return folder / "runs" / "tiny"


@pytest.fixture(scope="module")
def reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("reference"), None, 8)


@pytest.mark.parametrize(("config_file", "micro"), [("zero2", 4), ("zero3", 8)])
def test_same_trajectory(config_file: str, micro: int, reference: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: draws, partners, shares or new labels that know ranks or micro batches; a loss that is normalised by
    the labels of a rank, or by their number where only parts of them count; a short last batch."""
    run = train(tiny_data, tmp_path, config_file, micro)
    wants, haves = read_lines(reference / "trace.jsonl"), read_lines(run / "trace.jsonl")
    assert len(haves) == len(wants) == 6
    for want, have in zip(wants, haves, strict=True):
        assert (have["sample_ids"], have["digest"]) == (want["sample_ids"], want["digest"])
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5), f"{config_file}, step {want['step']}"
    for name in ("train/loss_type", "train/loss_airline", "train/loss_clarity", "train/grad_norm", "val/loss"):
        want, have = (
            [line[name] for line in read_lines(one / "metrics.jsonl") if name in line] for one in (reference, run)
        )
        assert have == pytest.approx(want, rel=1e-4), name
    drawn = [row for line in wants[:4] for row in line["sample_ids"]]
    assert len(drawn) == 56 > len(set(drawn)), "an epoch in which some rows come more than once"
