"""`hybrid-dist plan`: what it recommends, what it prints, its exit codes."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from hybrid_dist import cli
from hybrid_dist.config import load_config
from hybrid_dist.distributed import tuning
from hybrid_dist.plan import Plan, Planner, fit
from hybrid_dist.plan.table import advice
from tests.conftest import ROOT, environment, tiny_values

CLASSES = {"type": 3, "airline": 2}
ORDER = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]


@pytest.fixture(scope="module")
def config_file(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    values = tiny_values(tiny_data, folder)
    # Nothing of this may be looked for: there are no such weights.
    values["model"]["cnn"]["weights"] = values["model"]["transformer"]["weights"] = "hub"
    values["model"]["allow_scratch"] = False
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def planner(config_file: Path) -> Planner:
    """On 4 GPUs; the tests change how much memory they have."""
    return Planner(load_config(config_file), CLASSES, 4, 80_000_000_000, "cuda")


def plan(planner: Planner, memory: int) -> Plan:
    planner.memory = memory
    return planner.plan(lambda what: None)


def test_more_memory_is_never_worse(planner: Planner) -> None:
    """Catches: a recommendation that does not fit, or that less memory would have got a better one for."""
    rows = plan(planner, 80_000_000_000).rows
    assert {row.launch for row in rows} == set(ORDER)
    assert {row.micro_batch for row in rows} == {1, 2, 4}, "of 16 on 4 processes"
    before = None
    for memory in sorted({row.peak for row in rows} | {row.peak - 1 for row in rows}):
        found = plan(planner, memory)
        for choice in (found.run, *found.phases.values()):
            if choice is not None:
                assert choice.peak <= memory
        run = found.run
        now = None if run is None else (-ORDER.index(run.launch), not run.recompute, run.micro_batch)
        if before is not None:
            assert now is not None
            assert now >= before
        before = now
    assert before == (0, True, 4), "everything fits: DDP, and the largest micro batch"


def test_recomputing(planner: Planner, config_file: Path) -> None:
    """Catches: recomputing that saves nothing or costs nothing, that is not offered where nothing else fits, is typed
    wrongly, or counts as the model's own arithmetic."""
    by = {(row.phase, row.launch, row.micro_batch, row.recompute): row for row in plan(planner, 80_000_000_000).rows}
    for phase in "bc":
        plain, again = (by[phase, "ddp", 4, recompute] for recompute in (False, True))
        assert again.activations < 0.6 * plain.activations and again.peak < plain.peak
        assert (again.parameters, again.sent) == (plain.parameters, plain.sent)
    assert by["a", "ddp", 4, True].peak == by["a", "ddp", 4, False].peak, "frozen branches keep nothing"
    three, again = (by["c", "zero3", 4, recompute] for recompute in (False, True))
    assert again.peak < three.peak and again.sent >= three.sent, "weights are gathered for it once more"
    most = {recompute: max(by[p, "ddp", 4, recompute].peak for p in "abc") for recompute in (True, False)}
    small = Planner(load_config(config_file), CLASSES, 4, most[False] - 1, "cuda")
    choice = small.choose(["a", "b", "c"])
    assert choice is not None and (choice.launch, choice.recompute) == ("ddp", False), "a smaller micro batch"
    least = min(row.peak for row in by.values() if row.launch == "ddp" and row.phase == "c" and not row.recompute)
    few = Planner(load_config(config_file, ["train.checkpoint_activations=[cnn]"]), CLASSES, 4, least - 1, "cuda")
    assert few.recomputed == ("cnn",)
    tight = Planner(load_config(config_file), CLASSES, 4, least - 1, "cuda").choose(["c"])
    assert tight is not None and tight.launch == "ddp" and tight.recompute
    assert tight.overrides[0] == "train.checkpoint_activations=[cnn,transformer]"


def test_phases_of_different_sizes(config_file: Path) -> None:
    """Catches: a phase that is planned with another one's pictures."""
    changes = ("phases.1.image_size=64", 'phases.1.trainable=["all"]', "model.transformer=null", "model.fusion=concat")
    planner = Planner(load_config(config_file, changes), CLASSES, 1, 80_000_000_000, "cuda")
    small, large = (planner.row(phase, planner.strategies[0], 4) for phase in "bc")
    assert large.activations / small.activations == pytest.approx((96 / 64) ** 2, rel=0.05), "of 64 and 96 pixels"
    assert large.parameters == small.parameters


def test_what_grows_with_what(planner: Planner, config_file: Path) -> None:
    """Catches: activations that don't follow the micro batch, states that don't shrink with more processes."""
    rows = {(row.phase, row.launch, row.micro_batch): row for row in plan(planner, 80_000_000_000).rows}
    for phase in ("b", "c"):
        for launch in ORDER:
            small, large = rows[phase, launch, 1], rows[phase, launch, 4]
            assert small.activations < large.activations < 4.1 * small.activations
            assert small.peak < large.peak
            assert (small.parameters, small.optimizer) == (large.parameters, large.optimizer)
            assert small.accumulation == 4 * large.accumulation
    assert rows["a", "ddp", 4].optimizer < rows["b", "ddp", 4].optimizer < rows["c", "ddp", 4].optimizer
    more = Planner(load_config(config_file), CLASSES, 8, 80_000_000_000, "cuda")
    strategy = next(strategy for strategy in more.strategies if strategy.name == "zero3")
    assert more.row("c", strategy, 2).optimizer < rows["c", "zero3", 2].optimizer


def test_the_smallest_buckets(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a bucket that fills with the last gradient, after the last operation; buckets not set as in training."""
    planner = Planner(load_config(config_file), CLASSES, 4, 1, "cuda")
    usual = [planner.row("c", strategy, 4).buckets for strategy in planner.strategies]
    monkeypatch.setattr(tuning, "FEWEST_IN_A_BUCKET", 1)
    monkeypatch.setattr(tuning, "BUCKETS", 1_000_000)
    for strategy, before in zip(planner.strategies, usual, strict=True):
        row = planner.row("c", strategy, 4)
        assert row.buckets <= before
        assert (row.buckets > 0) == (row.launch != "ddp")
        assert row.peak - row.workspace >= row.parameters + row.optimizer


def test_fp16_is_not_planned_where_training_refuses_it(config_file: Path) -> None:
    """Catches: a recommendation that DeepSpeed's fp16 makes wrong."""
    config = load_config(config_file, ["train.precision=fp16"])
    assert {strategy.name for strategy in Planner(config, CLASSES, 2, 1, "cuda").strategies} == {"ddp"}


def test_command(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: figures that scripts can't read, a line that can't be typed, a fit that is none and exits with 0."""
    command = ["plan", "--config", str(config_file), "--gpus", "2"]
    asked = [*command, "--gpu", "l4", "--loader-rate", "1e6", "--json", "--plot", str(tmp_path / "plan.svg")]
    assert cli.main([*asked, "train.micro_batch_size=2"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["run"]["launch"] == "ddp"
    assert found["run"]["micro_batch"] == 8
    assert found["memory"] == 24_000_000_000
    assert found["classes"] == CLASSES, "the data is there: its own labels count"
    assert len(found["rows"]) == 3 * 6 * 2 * 4, "phases, launch files, with and without recomputing, micro batches"
    assert all(isinstance(row["peak"], int) and row["peak"] > row["parameters"] for row in found["rows"])
    paces = [row["pace"] for row in found["rows"]]
    assert all(pace["images_per_s"] > 0 and pace["bottleneck"] in pace["parts"] for pace in paces)
    assert (found["pictures"], found["steps"]) == (56, {"a": 10, "b": 10, "c": 10})
    assert [scale["processes"] for scale in found["scaling"]] == [1, 2, 4, 8, 16]
    plain = [row for row in found["rows"] if not row["recompute"]]
    seconds = {(row["phase"], row["launch"], row["micro_batch"]): row["pace"]["seconds"] for row in plain}
    assert found["run"]["hours"] == pytest.approx(sum(10 * seconds[phase, "ddp", 8] for phase in "abc") / 3600)
    assert found["machine"]["device"]["title"] == "L4"
    assert "phase c" in (tmp_path / "plan.svg").read_text()

    assert cli.main([*command, "--gpu-memory", "24", "train.micro_batch_size=2", "data.train_csv=none.csv"]) == 0
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if line.startswith("  accelerate launch"))
    assert shlex.split(line)[-3:] == [str(config_file), "data.train_csv=none.csv", "train.micro_batch_size=8"]
    assert "launch/accelerate/ddp.yaml train.py" in line
    assert "100 for type" in said

    command[-1] = "1"
    assert cli.main([*command, "--gpu-memory", "0.5", "data.train_csv=none.csv"]) == 3
    said = capsys.readouterr().out
    assert "no launch file" in said
    assert "GPUs of 2 GB would do; smaller pictures" in said


def test_number_of_processes_is_named(planner: Planner, config_file: Path) -> None:
    """Catches: a command that starts 2 processes where 4 were planned."""
    lines = advice(plan(planner, 80_000_000_000), str(config_file), [], 8)
    assert lines[0] == "all phases: ddp, micro batch 4"
    assert "--num_processes 4 train.py" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "0", "--gpu-memory", "80"], "--gpus 0"),
        (["--gpus", "2", "--gpu-memory", "0"], "--gpu-memory 0"),
        (["--gpus", "2", "--gpu-memory", "nan"], "--gpu-memory nan"),
        (["--gpus", "2"], "--gpu NAME"),
        (["--gpus", "2", "--gpu", "a100"], "--gpu a100: did you mean a100-"),
        (["--gpus", "2", "--gpu", "t4", "train.precision=bf16"], "train.precision=fp16 would do"),
        (["--gpus", "2", "--gpu", "l4", "--network", "-1"], "--network -1"),
        (["--gpus", "2", "--gpu", "l4", "--plot", "plan.gif"], "FILE.png or FILE.svg"),
        (["--gpus", "3", "--gpu-memory", "80"], "does not divide"),
        (["--gpus", "2", "--gpu-memory", "80", "phases.1.trainable=[nothing*]"], "phases.1.trainable"),
        (["--gpus", "2", "--gpu-memory", "80", "phases.1.lr={heads: 1e-3}"], "phases.1.lr: no rate for"),
        (["--gpus", "2", "--gpu-memory", "80", "model.fusion=glue"], "model.fusion"),
    ],
)
def test_impossible_questions(
    config_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Catches: a stack trace, or an answer, where the question can't be meant."""
    assert cli.main(["plan", "--config", str(config_file), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_no_config(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a stack trace for a wrong path."""
    assert cli.main(["plan", "--config", "nowhere.yaml", "--gpus", "2", "--gpu-memory", "80"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_fit(tiny_config: Callable[..., Path]) -> None:
    """Catches: a config that does not fit and is told that it does, or is sent to a micro batch that fits neither."""
    config = load_config(tiny_config())
    roomy = fit(config, 2, 80_000_000_000, "cuda")
    assert (roomy.fits, roomy.launch, roomy.micro_batch, roomy.phase) == (True, "ddp", 8, "c")
    tight = fit(config, 2, roomy.bytes - 1, "cuda", launch="ddp")
    assert not tight.fits
    assert 0 < tight.micro_batch < 8
    assert tight.bytes == roomy.bytes
    assert fit(config, 2, 1, "cuda").micro_batch == 0


def test_the_command_line_stays_quick() -> None:
    """Catches: torch imported by every command, for one that needs it."""
    code = "import sys, hybrid_dist.cli as cli; cli.build_parser(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), timeout=300, check=False)
    assert done.returncode == 0
