"""One trajectory: the same samples, pixels and losses on every topology and with every micro batch."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from hybrid_dist.data.order import epoch_order
from tests.conftest import launch, read_lines, tiny_values

# name: launch file (None: plain python), extra launcher arguments, micro batch
TOPOLOGIES = {
    "one, micro 8": (None, (), 8),
    "one, micro 4": (None, (), 4),
    "one, micro 2": (None, (), 2),
    "DDP x2": ("ddp", (), 4),
    "ZeRO 0 x2": ("zero1", ("--zero_stage", "0"), 4),
    "ZeRO 1 x2": ("zero1", (), 8),
    "ZeRO 2 x2": ("zero2", (), 4),
    "ZeRO 3 x2": ("zero3", (), 4),
    "ZeRO 3 x4": ("zero3", ("--num_processes", "4"), 2),
    "ZeRO 2 offload x2": ("zero2_offload", (), 4),
    "ZeRO 3 offload x2": ("zero3_offload", (), 4),
}


REFERENCE = "one, micro 8"
SLOW = ("one, micro 2", "ZeRO 0 x2", "ZeRO 2 offload x2")
"""What differs little from the others is for `make soak`."""
POISONED = (REFERENCE, "DDP x2", "ZeRO 0 x2", "ZeRO 2 x2", "ZeRO 3 x2", "ZeRO 2 offload x2")
"""Where the poisoned run is made."""
BACK = (REFERENCE, "DDP x2", "ZeRO 2 x2", "ZeRO 3 x2", "ZeRO 2 offload x2")
"""Where the run that goes back is tried."""
PROFILED = "ZeRO 3 x2"
"""Where the run is profiled on its way."""
KEPT = (REFERENCE, "DDP x2", "ZeRO 3 x2")
"""Where the run that keeps the features of its frozen branches is made."""
MIXED = (REFERENCE, "ZeRO 2 x2", "ZeRO 3 x2")
"""Where the run is made with all that the recipe adds to data and losses."""
HALF = ("ZeRO 2 x2",)
"""Where the run is made in bf16."""
FORGOTTEN = (5, 17)
"""Rows whose features are lost in it: one rank runs the branches for them in each epoch, and ZeRO 3 needs all."""
TWINS = {"poisoned": POISONED, "gone_back": BACK, "kept": KEPT, "mixed": MIXED, "half": HALF}


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


# By number of the step: where in the global batch the sample stands that spoils it, and how. On two processes positions
# 4 to 7 are the second one's, so each of these is met by one rank alone. Step 14 is an epoch's last and short.
POISON = {3: (5, "pixels"), 14: (5, "label"), 15: (0, "label"), 27: (12, "pixels")}


# Three bad steps in a row are too many for that twin. The 16th comes in phase b's fifth step; a line is written after
# the ninth, when all is well again, and a checkpoint is there of the eighth.
STREAK = {16: (5, "label"), 17: (5, "pixels"), 18: (4, "label")}


RECOMPUTED = ("one, micro 4", "ZeRO 2 offload x2", "ZeRO 3 x2")
"""Where activations are computed again."""


def poison(steps: dict[int, tuple[int, str]]) -> dict[int, tuple[int, str]]:
    """By step the row of the sample that spoils it, and how."""
    found = {}
    for step, (position, kind) in steps.items():
        phase, phase_step = divmod(step - 1, 10)
        epoch, in_epoch = divmod(phase_step, 4)
        found[step] = (int(epoch_order(56, 3, "abc"[phase], epoch)[16 * in_epoch + position]), kind)
    return found


class Runs:
    """A run and its poisoned twin on each topology, started in one launch when they are first asked for."""

    def __init__(self, data: Path, factory: pytest.TempPathFactory):
        self.data, self.factory = data, factory
        self._made: dict[str, Path] = {}

    def __call__(self, name: str, twin: str = "tiny") -> Path:
        """The run's folder."""
        if name not in self._made:
            self._made[name] = self.factory.mktemp("runs")
            configs = [
                write(self.data, self._made[name] / each, name, each)
                for each in ("tiny", *(twin for twin, where in TWINS.items() if name in where))
            ]
            config_file, extra, _ = TOPOLOGIES[name]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("POISON", json.dumps({"poisoned": poison(POISON), "gone_back": poison(STREAK)}))
                patch.setenv("FORGET", json.dumps({"kept": FORGOTTEN}))
                script = "tests/distributed/many.py"
                launch(*map(str, configs), config_file=config_file, extra=extra, script=script, timeout=840)
        return self._made[name] / twin / "runs" / twin


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_data, tmp_path_factory)


@pytest.fixture(scope="module")
def reference(runs: Runs) -> Path:
    """The run that all others are held against: one process, micro batches of 8."""
    return runs(REFERENCE)


def write(data: Path, folder: Path, name: str, run: str) -> Path:
    config_file, _, micro = TOPOLOGIES[name]
    folder.mkdir()
    values = tiny_values(data, folder)
    values["run"]["name"] = run
    values["model"]["dropout"] = values["model"]["transformer"]["kwargs"]["drop_path_rate"] = 0.2
    # Once with loader processes, that live beside DeepSpeed's threads.
    values["data"]["workers"] = 1 if config_file == "zero2" else 0
    values["train"] |= {"precision": "bf16" if run == "half" else "fp32", "micro_batch_size": micro}
    if name in RECOMPUTED:
        values["train"]["checkpoint_activations"] = ["cnn", "transformer"]
    if run == "tiny" and name == PROFILED:
        values["train"]["profile"] = {"start": 3, "steps": 1}
    if run == "gone_back":
        values["train"] |= {"max_bad_steps": 3, "ema": 0.9}
        values["checkpoint"], values["tracking"]["log_every"] = {"every_steps": 2, "keep": 1}, 9
    if run == "kept":
        values["data"] |= {"workers": int(config_file == "ddp"), "mixup": 0.4}
        values["phases"] = [phase | {"steps": 6, "cache_features": 1} for phase in values["phases"][:2]]
    if run == "mixed":
        values["data"] |= {"balance": "airline", "mixup": 0.4, "cutmix": 1.0, "mix_prob": 0.6, "degrade": 0.5}
        values["tasks"]["type"] |= {"smoothing": 0.1, "tail": "logit_adjusted"}
        values["tasks"]["airline"] |= {"tail": "balanced"}
        values["phases"] = [values["phases"][2] | {"steps": 6}]
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


def test_reference_sees_every_sample_once_an_epoch(reference: Path) -> None:
    """Catches: a sample dropped or repeated at the short end of an epoch, or phases that share an order."""
    trace = read_lines(reference / "trace.jsonl")
    assert [line["step"] for line in trace] == list(range(1, 31))
    assert [line["phase"] for line in trace] == ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    assert [len(line["sample_ids"]) for line in trace[:10]] == [16, 16, 16, 8, 16, 16, 16, 8, 16, 16]
    firsts = []
    for phase in range(3):
        ids = [row for line in trace[10 * phase : 10 * phase + 8] for row in line["sample_ids"]]
        assert sorted(ids[:56]) == sorted(ids[56:]) == list(range(56))
        assert ids[:56] != ids[56:]
        firsts.append(ids[:56])
    assert firsts[0] != firsts[1] != firsts[2]
    assert len({line["digest"] for line in trace}) == 30


def expect_same_steps(run: Path, expected: Path, count: int) -> None:
    """The same samples and pixels in each of `count` steps, and the losses to 1e-5."""
    wants, haves = read_lines(expected / "trace.jsonl"), read_lines(run / "trace.jsonl")
    assert len(wants) == count
    assert [(line["phase"], line["step"], line["sample_ids"], line["digest"]) for line in haves] == [
        (line["phase"], line["step"], line["sample_ids"], line["digest"]) for line in wants
    ]
    for want, have in zip(wants, haves, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5), f"step {want['step']}"


def grad_norms(run: Path) -> list[float]:
    return [line["train/grad_norm"] for line in read_lines(run / "metrics.jsonl") if "train/grad_norm" in line]


OTHERS = [name for name in TOPOLOGIES if name != REFERENCE]


@pytest.mark.parametrize("name", params(OTHERS))
def test_same_trajectory(name: str, reference: Path, runs: Runs) -> None:
    """Catches: an order, an augmentation, a normalisation of the loss, a clipping or a schedule that knows ranks,
    micro batches or ZeRO stages; weights or optimizer state lost between phases."""
    run = runs(name)
    expect_same_steps(run, reference, 30)
    for want, have in zip(grad_norms(reference), grad_norms(run), strict=True):
        assert have == pytest.approx(want, rel=1e-4), "losses alone would not show a gradient that is off by a factor"
    wants = [line for line in read_lines(reference / "metrics.jsonl") if "val/score" in line]
    haves = [line for line in read_lines(run / "metrics.jsonl") if "val/score" in line]
    assert [line["step"] for line in haves] == [line["step"] for line in wants]
    for want, have in zip(wants, haves, strict=True):
        assert have["val/loss"] == pytest.approx(want["val/loss"], rel=1e-5)
        assert have["val/clarity_mae"] == pytest.approx(want["val/clarity_mae"], rel=1e-4)


@pytest.mark.parametrize("name", params(POISONED))
def test_poisoned_steps_are_left_out(name: str, runs: Runs) -> None:
    """Catches: a bad sample on one rank that only this one hears of, that some backend lets touch weights or moments,
    or that is not named; a run that ends elsewhere for it than on one process, or far from a clean one."""
    run, one, clean = runs(name, "poisoned"), runs(REFERENCE, "poisoned"), runs(REFERENCE)
    bad = read_lines(run / "bad_steps.jsonl")
    assert {line["step"]: line["suspects"] for line in bad} == {
        step: [row] for step, (row, _) in poison(POISON).items()
    }
    traced = {line["step"]: line for line in read_lines(run / "trace.jsonl")}
    assert all(line["sample_ids"] == sorted(traced[line["step"]]["sample_ids"]) for line in bad)
    want = {line["step"]: line["loss"] for line in read_lines(one / "trace.jsonl")}
    for step, line in traced.items():
        if POISON.get(step, ("", ""))[1] == "pixels":
            assert line["loss"] is None
        else:
            assert line["loss"] == pytest.approx(want[step], rel=1e-5), f"step {step}"
    ends = [line["val/loss"] for line in read_lines(run / "metrics.jsonl") if "val/score" in line]
    cleans = [line["val/loss"] for line in read_lines(clean / "metrics.jsonl") if "val/score" in line]
    assert ends[-1] == pytest.approx(cleans[-1], rel=0.05)
    assert ends[-1] < cleans[0], "and it has learned"


@pytest.mark.parametrize("name", params(BACK))
def test_going_back(name: str, runs: Runs) -> None:
    """Catches: ranks that go back to different places, an engine or a mean that does not come back with the weights; a
    streak that is not seen because it is over when a line is written, or behind which no checkpoint is left."""
    run, clean = runs(name, "gone_back"), runs(REFERENCE)
    lines = read_lines(run / "bad_steps.jsonl")
    assert [line["went_back_to"] for line in lines if "reason" not in line] == ["b-14"]
    assert [line["step"] for line in lines if "reason" in line] == [16, 17, 18]
    # The order's samples do not change, and what spoiled them does not come again.
    wants = {line["step"]: line for line in read_lines(clean / "trace.jsonl") if line["phase"] != "c"}
    haves = {line["step"]: line for line in read_lines(run / "trace.jsonl") if line["phase"] != "c"}
    assert {step: line["sample_ids"] for step, line in haves.items()} == {
        step: line["sample_ids"] for step, line in wants.items()
    }
    one = {line["step"]: line["loss"] for line in read_lines(runs(REFERENCE, "gone_back") / "trace.jsonl")}
    for line in read_lines(run / "trace.jsonl"):
        assert line["loss"] == pytest.approx(one[line["step"]], rel=1e-5), line["step"]
    ends = [[line for line in read_lines(each / "metrics.jsonl") if "val/score" in line] for each in (
        run, runs(REFERENCE, "gone_back"))]  # fmt: skip
    assert [line["step"] for line in ends[0]] == [line["step"] for line in ends[1]]
    assert ends[0][-1]["val/loss"] == pytest.approx(ends[1][-1]["val/loss"], rel=1e-5)


ENDINGS = [f"-rank-0000{rank}.trace.json.gz" for rank in range(2)]


def ranges(events: list[dict[str, Any]], part: str) -> list[tuple[float, float]]:
    """When each range of a part began and ended, in order."""
    own = [event for event in events if event["name"] == f"hybrid-dist: {part}"]
    return sorted((event["ts"], event["ts"] + event["dur"]) for event in own)


def test_profiled_on_its_way(runs: Runs) -> None:
    """Catches: a rank without a profile; an update within ZeRO's backward that counts as backward; collectives that
    are not seen. That it changes nothing is what the other tests of this run say."""
    folder = runs(PROFILED) / "profile"
    names = {f"{phase}{ending}" for phase in "abc" for ending in (".json", *ENDINGS)}
    assert {file.name for file in folder.iterdir()} == names
    for phase in "abc":
        found = json.loads((folder / f"{phase}.json").read_text())
        assert found["steps"] == [3]
        assert sum(found["split"].values()) == pytest.approx(found["seconds"], rel=1e-6)
        assert min(found["split"].values()) > 0
        assert found["split"]["communication"] <= found["communication_in_flight"] * (1 + 1e-6)
        with gzip.open(folder / f"{phase}{ENDINGS[1]}", "rt") as file:
            events = json.load(file)["traceEvents"]
        backwards, updates = (ranges(events, part) for part in ("backward", "optimizer"))
        assert len(backwards) == 16 // (2 * TOPOLOGIES[PROFILED][2])
        assert any(backwards[-1][0] < begin and end <= backwards[-1][1] for begin, end in updates), "within the last"


@pytest.mark.parametrize("name", [REFERENCE, "DDP x2", "ZeRO 2 x2", "ZeRO 3 x2"])
def test_communication_is_told(name: str, runs: Runs) -> None:
    """Catches: a share of communication that no phase has, or that is told where there is nobody to talk to."""
    lines = read_lines(runs(name) / "metrics.jsonl")
    shares = [(line["phase"], line["perf/communication"]) for line in lines if "perf/communication" in line]
    assert [phase for phase, _ in shares] == ([] if name == REFERENCE else ["a", "b", "c"])
    assert all(0 < share < 1 for _, share in shares)


@pytest.mark.parametrize("name", KEPT)
def test_features_that_are_kept(name: str, runs: Runs) -> None:
    """Catches: ranks that read what another has not written yet, or find another's entries under their own rows; one
    that runs a branch whose weights ZeRO 3 gathers while the others read; files that stay."""
    run = runs(name, "kept")
    expect_same_steps(run, runs(REFERENCE, "kept"), 12)
    assert not (run / "features").exists()


@pytest.mark.parametrize("name", [name for name in MIXED if name != REFERENCE])
def test_mixed_and_balanced(name: str, runs: Runs) -> None:
    """Catches: draws, partners, shares or new labels that know ranks or micro batches; a loss that is normalised by
    the labels of a rank, or by their number where only parts of them count; a short last batch."""
    run, one = runs(name, "mixed"), runs(REFERENCE, "mixed")
    expect_same_steps(run, one, 6)
    for key in ("train/loss_type", "train/loss_airline", "train/loss_clarity", "train/grad_norm", "val/loss"):
        want, have = ([line[key] for line in read_lines(each / "metrics.jsonl") if key in line] for each in (one, run))
        assert have == pytest.approx(want, rel=1e-4), key
    drawn = [row for line in read_lines(one / "trace.jsonl")[:4] for row in line["sample_ids"]]
    assert len(drawn) == 56 > len(set(drawn)), "an epoch in which some rows come more than once"


@pytest.mark.parametrize("name", HALF)
def test_bf16_follows(name: str, runs: Runs) -> None:
    """Catches: an autocast that DeepSpeed does not get to see, or weights and moments that are bf16 too."""
    run = runs(name, "half")
    wants, haves = read_lines(runs(REFERENCE) / "trace.jsonl"), read_lines(run / "trace.jsonl")
    assert [line["digest"] for line in haves] == [line["digest"] for line in wants]
    differences = [abs(have["loss"] / want["loss"] - 1) for want, have in zip(wants, haves, strict=True)]
    assert 1e-7 < max(differences) < 0.02
    assert {tensor.dtype for tensor in load_file(run / "model" / "model.safetensors").values()} == {torch.float32}
