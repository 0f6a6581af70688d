"""Bad steps: left out, named, gone back behind once. In this process, on real data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybrid_dist.checkpoint import Saver
from hybrid_dist.config import TaskConfig
from hybrid_dist.data.dataset import Batch
from hybrid_dist.model.heads import BALANCE
from hybrid_dist.training import phase as phase_module
from hybrid_dist.training.objective import Objective
from hybrid_dist.training.tasks import make_tasks
from tests.conftest import read_lines
from tests.distributed.running import expect_same_run

PHASES = [
    {"name": "a", "trainable": ["heads", "fusion"], "steps": 4, "lr": 1e-3},
    {"name": "b", "trainable": ["all"], "steps": 12, "lr": 1e-3},
]
TASKS = {
    "type": TaskConfig(kind="classification", column="typename", weight=2.0),
    "clarity": TaskConfig(kind="regression", column="clarity"),
}
NAN = math.nan


@pytest.fixture
def config(tiny_config: Callable[..., Path]) -> Path:
    train_keys = {"global_batch_size": 16, "micro_batch_size": 8, "precision": "fp32", "max_bad_steps": 3}
    return tiny_config(
        phases=PHASES, checkpoint={"every_steps": 1, "keep": 2}, tracking={"log_every": 1}, train=train_keys
    )


def spoil(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool], then: Callable[[int], Any] = lambda n: None):
    """The losses of those calls of the training step are no numbers; `then` is called before each."""
    make_step, made = phase_module.train_step, 0

    def step(engine: Any, objective: Any, *rest: Any) -> Any:
        nonlocal made
        made += 1
        then(made)

        class Spoiled(Objective):
            def __call__(self, *arguments: Any) -> Any:
                micro = super().__call__(*arguments)
                micro.shares[0] += NAN
                micro.shares[1] += NAN
                return micro

        return make_step(engine, Spoiled(objective.tasks) if when(made) else objective, *rest)

    monkeypatch.setattr(phase_module, "train_step", step)


def folder(config: Path, runs: str = "runs") -> Path:
    return config.parent / runs / "tiny"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def micro(types: list[int], clarity: list[float], logits: torch.Tensor, scores: torch.Tensor) -> Any:
    batch = Batch(
        torch.zeros(len(types), 3, 1, 1, dtype=torch.uint8),
        {"type": torch.tensor(types), "clarity": torch.tensor(clarity)}, torch.arange(len(types)),
    )  # fmt: skip
    return {"type": logits, "clarity": scores}, batch


def objective() -> Objective:
    return Objective(make_tasks(TASKS, {"type": ("A", "B", "C")}))


def test_objective_by_hand() -> None:
    """Catches: a loss not divided by the whole global batch's labels, a weight left out, or another limit."""
    outputs, batch = micro([0, -1], [NAN, 0.2], torch.zeros(2, 3), torch.tensor([0.5, 0.6]))
    found = objective()(outputs, batch, {"type": 4, "clarity": 2})
    assert found.loss.item() == pytest.approx(2 * math.log(3) / 4 + 0.5 * 0.4**2 / 2)
    assert found.shares.tolist() == pytest.approx([found.loss.item(), math.log(3) / 4, 0.04])
    assert found.samples.tolist() == pytest.approx([2 * math.log(3), 0.08])
    assert objective().limit == pytest.approx(10 * (2 * math.log(3) + 0.125))


def test_learned_balance_by_hand() -> None:
    """Catches: variances that enter with a wrong sign or factor, or that a split into micro batches counts twice."""
    s = torch.tensor([0.5, -1.0], requires_grad=True)
    logits, scores = torch.randn(4, 3), torch.rand(4)
    outputs, batch = micro([0, 1, -1, 2], [0.1, NAN, 0.4, 0.9], logits, scores)
    counts = {"type": 3, "clarity": 3}
    whole = objective()(outputs | {BALANCE: s}, batch, counts)
    _, of_type, of_clarity = whole.shares.tolist()
    hand = 2 * (math.exp(-0.5) * of_type + 0.25) + math.exp(1.0) * of_clarity - 0.5
    assert whole.loss.item() == pytest.approx(hand)
    assert whole.shares[0].item() == pytest.approx(2 * of_type + of_clarity), "told with the tasks' own weights"
    parts = [
        objective()(outputs | {BALANCE: s}, batch, counts).loss
        for outputs, batch in (
            micro([0, 1], [0.1, NAN], logits[:2], scores[:2]), micro([-1, 2], [0.4, 0.9], logits[2:], scores[2:]),
        )
    ]  # fmt: skip
    assert sum(part.item() for part in parts) == pytest.approx(hand)
    whole.loss.backward()
    sums = torch.autograd.grad(parts[0] + parts[1], s)[0]
    assert torch.allclose(s.grad, sums)


def test_balance_of_a_task_with_one_class() -> None:
    """Catches: a task that nothing can be learned of, whose variance falls without end and takes the others along."""
    tasks = make_tasks(TASKS, {"type": ("A",)})
    s = torch.zeros(2, requires_grad=True)
    outputs, batch = micro([0, 0], [0.1, 0.5], torch.zeros(2, 1), torch.tensor([0.3, 0.3]))
    found = Objective(tasks)(outputs | {BALANCE: s}, batch, {"type": 2, "clarity": 2})
    assert torch.autograd.grad(found.loss, s)[0][0] == 0


@pytest.mark.parametrize(("totals", "bad"), [([1.0, 0.5, 0.0], False), ([1.0, NAN, 0.0], True), ([1e9, 1, 1], True)])
def test_bad_losses(totals: list[float], bad: bool) -> None:
    """Catches: a task's loss that is no number, or one that is beyond the limit, and passes."""
    assert bool(objective().bad(torch.tensor(totals))) == bad


def test_a_bad_step_changes_nothing(call: Callable[..., int], config: Path, monkeypatch: Any, capsys: Any) -> None:
    """Catches: weights, moments or counts that a bad step touches; bad gradients of a good loss that are let pass."""
    losses = Objective.__call__

    def root_of_nothing(own: Objective, outputs: Any, *rest: Any) -> Any:
        clean = losses(own, outputs, *rest)
        # 0 × ∞ in its gradient
        return replace(clean, loss=clean.loss + 0.0 * (0.0 * outputs["type"].sum()).sqrt()) if spoiled else clean

    spoiled, made, make_step = False, 0, phase_module.train_step

    def step(*arguments: Any) -> Any:
        nonlocal spoiled, made
        made += 1
        spoiled = made == 7
        return make_step(*arguments)

    monkeypatch.setattr(phase_module, "train_step", step)
    monkeypatch.setattr(Objective, "__call__", root_of_nothing)
    kept: dict[str, dict[str, torch.Tensor]] = {}
    begin = Saver.begin

    def keep(saver: Saver, content: Any, pieces: Any, *rest: Any) -> Any:
        pieces = list(pieces)
        kept[content.name] = {
            f"{piece.name} {kind}": value.clone() for piece in pieces for kind, value in piece.values.items()
        }
        kept[content.name]["steps"] = torch.tensor([piece.step or 0 for piece in pieces])
        return begin(saver, content, pieces, *rest)

    monkeypatch.setattr(Saver, "begin", keep)
    assert call(config, "train.ema=0.9") == 0
    before, after, later = kept["b-6"], kept["b-7"], kept["b-8"]
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(key.endswith(" ema") for key in before)
    assert not torch.equal(before["steps"], later["steps"])
    bad = read_lines(folder(config) / "bad_steps.jsonl")
    assert [(line["step"], line["reason"]) for line in bad] == [(7, "the gradients are no numbers")]
    assert "step 7: the gradients are no numbers" in capsys.readouterr().err
    lines = {line["step"]: line for line in read_lines(folder(config) / "metrics.jsonl") if "train/lr" in line}
    assert lines[7]["train/loss"] is None
    assert lines[8]["train/loss"] > 0


def test_back_to_the_last_good_checkpoint_once(
    call: Callable[..., int], config: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Catches: going back to a checkpoint among the bad steps, behind more than them, or to a good one that was pruned;
    a redo that is not what would have been, or lines that stand twice."""
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    monkeypatch.setattr(phase_module, "train_step", phase_module.train_step)
    spoil(monkeypatch, lambda made: 9 <= made < 12)
    assert call(config) == 0
    said = capsys.readouterr().err
    assert "3 bad steps in a row, the last is step 11: the loss of type is no number; no sample stands out" in said
    assert "back to b-8, once" in said
    expect_same_run(folder(config), folder(config, "whole"))
    lines = read_lines(folder(config) / "bad_steps.jsonl")
    assert [line["step"] for line in lines if "reason" in line] == [9, 10, 11]
    assert [line["went_back_to"] for line in lines if "reason" not in line] == ["b-8"]


def test_it_does_not_go_back_twice(call: Callable[..., int], config: Path, monkeypatch: Any, capsys: Any) -> None:
    """Catches: a run that goes round in circles, also over a stop; one that forgets who the suspects are, or ends with
    a traceback; checkpoints of the abandoned steps that a stop before the redo would go on from."""
    make_step = phase_module.train_step
    run = folder(config)

    def stop(made: int) -> None:
        if made == 12:  # the first step after going back
            assert names(run) == ["b-8"]
            (run / "STOP").touch()

    spoil(monkeypatch, lambda made: made >= 9, stop)
    assert call(config) == 75
    assert json.loads((run / "status.json").read_text())["step"] == 9
    monkeypatch.setattr(phase_module, "train_step", make_step)
    spoil(monkeypatch, lambda made: True)
    assert call(config) == 2
    said = capsys.readouterr().err
    assert "has not helped" in said
    assert "Traceback" not in said
    monkeypatch.setattr(phase_module, "train_step", make_step)
    assert call(config) == 0, "whatever it was is over"
    assert all(tensor.isfinite().all() for tensor in load_file(run / "model" / "model.safetensors").values())


def test_when_it_is_noticed_makes_no_difference(call: Callable[..., int], config: Path, monkeypatch: Any) -> None:
    """Catches: a streak that is over when a line is written and so is never seen, or a checkpoint after it that is
    gone back to; one that a stop makes forget."""
    keys = ("tracking.log_every=12", "train.max_bad_steps=2")
    assert call(config, f"run.dir={config.parent / 'whole'}", *keys) == 0
    make_step, run = phase_module.train_step, folder(config)

    def stop(made: int) -> None:
        if made == 11:
            (run / "STOP").touch()

    spoil(monkeypatch, lambda made: made in (9, 10), stop)
    assert call(config, *keys) == 75
    state = json.loads((run / "checkpoints" / "b-11" / "state.json").read_text())
    assert (state["bad_streak"], state["too_many_since"]) == (0, 9)
    monkeypatch.setattr(phase_module, "train_step", make_step)
    assert call(config, *keys) == 0
    assert [line.get("went_back_to") for line in read_lines(run / "bad_steps.jsonl")] == [None, None, "b-8"]
    expect_same_run(run, folder(config, "whole"))


def test_nothing_to_go_back_to(call: Callable[..., int], config: Path, monkeypatch: Any, capsys: Any) -> None:
    """Catches: a first phase that begins with bad steps, and goes on with fresh weights as if nothing had been."""
    spoil(monkeypatch, lambda made: True)
    assert call(config, "checkpoint.every_steps=null") == 2
    assert "no good checkpoint" in capsys.readouterr().err


def test_back_to_the_phase_before(call: Callable[..., int], config: Path, monkeypatch: Any) -> None:
    """Catches: bad first steps of a later phase that go back into the one before, or begin it on other weights."""
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    spoil(monkeypatch, lambda made: 5 <= made < 8)
    assert call(config) == 0
    expect_same_run(folder(config), folder(config, "whole"))


def test_learned_balance_is_left_with_training(call: Callable[..., int], config: Path) -> None:
    """Catches: variances that are not learned, not carried to the next phase, or that a model can't be opened with."""
    from hybrid_dist.inference.found import find_model
    from hybrid_dist.inference.opened import open_model

    assert call(config, "train.task_balance=uncertainty") == 0
    run = folder(config)
    values = [load_file(run / f"phase_{name}" / "best.safetensors")["heads.balance.log_variance"] for name in "ab"]
    assert all(value.abs().min() > 0 for value in values)
    opened = open_model(find_model(run), "cpu")
    assert "heads.balance.log_variance" not in opened.model.state_dict()
