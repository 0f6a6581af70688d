"""Profiles of steps: what they tell adds up, names nobody, and changes nothing."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybrid_dist.training import phase as phase_module
from hybrid_dist.training.profile_trace import SPLIT, allocated, joined, operations, split, stripped
from tests.distributed.running import expect_same_run

PHASES = [
    {"name": "a", "trainable": ["heads", "fusion"], "steps": 7, "lr": 1e-3},
    {"name": "b", "trainable": ["heads", "transformer"], "steps": 3, "lr": 1e-3},
    {"name": "c", "trainable": ["heads"], "steps": 1, "lr": 1e-3},
]


def profiled(run: Path, phase: str) -> dict[str, Any]:
    """A phase's figures, once they add up, and its trace is one that can be given away."""
    found: dict[str, Any] = json.loads((run / "profile" / f"{phase}.json").read_text())
    assert sum(found["split"].values()) == pytest.approx(found["seconds"], rel=1e-6)
    assert found["seconds"] == pytest.approx(sum(found["step_seconds"]) / len(found["steps"]))
    assert min(found["split"][part] for part in ("data", "forward", "backward", "optimizer")) > 0
    assert sum(row["seconds"] for row in found["operations"]) <= found["seconds"]
    with gzip.open(run / "profile" / f"{phase}-rank-00000.trace.json.gz", "rt") as file:
        text = file.read()
    trace = json.loads(text)
    steps = [event["name"] for event in trace["traceEvents"] if "hybrid-dist: step" in event["name"]]
    # A stop is noticed in one more.
    assert steps[: len(found["steps"])] == [f"hybrid-dist: step {step}" for step in found["steps"]]
    assert "host_name" not in trace and f'"{socket.gethostname()}"' not in text
    assert str(run) not in text and "/tmp" not in text
    return found


def test_the_same_run_profiled(
    call: Callable[..., int], tiny_config: Callable[..., Path], monkeypatch: Any, capsys: Any
) -> None:
    """Catches: a profile that changes a bit of the training; validations, checkpoints or steps of another start in it;
    a phase that is stopped or too short for it without one; a folder that is found unwritable after the work."""
    config = tiny_config(phases=PHASES, checkpoint={"every_steps": 2, "keep": 3})
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    whole, run = config.parent / "whole" / "tiny", config.parent / "runs" / "tiny"
    on = ("train.profile.start=3", "train.profile.steps=4")
    make_step, made = phase_module.train_step, 0

    def ask_to_stop(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 5:
            (run / "STOP").touch()
        return make_step(*arguments)

    monkeypatch.setattr(phase_module, "train_step", ask_to_stop)
    assert call(config, *on) == 75
    # A validation comes after the fourth.
    assert profiled(run, "a")["steps"] == [3, 4, 5]
    monkeypatch.setattr(phase_module, "train_step", make_step)

    (run / "profile").rename(run / "first")
    (run / "profile").write_text("in the way")
    assert call(config, *on) == 2
    assert f"{run / 'profile'}: can't be written" in capsys.readouterr().err
    (run / "profile").unlink()

    assert call(config, *on) == 0
    assert [profiled(run, phase)["steps"] for phase in "ab"] == [[6], [3]]
    said = capsys.readouterr().err
    assert "profile of phase b, steps 3 to 3, one process on cpu" in said and "  optimizer " in said
    files = {f"{phase}{ending}" for phase in "ab" for ending in (".json", "-rank-00000.trace.json.gz")}
    assert {file.name for file in (run / "profile").iterdir()} == files, "c ended before"
    expect_same_run(run, whole)


def event(kind: str, name: str, begin: float, end: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": end - begin, "tid": 1, "args": args}


RANGES = [
    ("step 7", 0, 100),
    ("data", 0, 10),
    ("forward", 10, 30),
    ("backward", 30, 90),
    ("optimizer", 70, 85),  # as under ZeRO
]
OWN = [event("user_annotation", f"hybrid-dist: {name}", begin, end) for name, begin, end in RANGES]


def microseconds(events: list[dict[str, Any]], on_cuda: bool) -> dict[str, float]:
    found = split(events, [7], on_cuda)
    assert found.steps == [pytest.approx(1e-4)]
    assert sum(found.parts.values()) == pytest.approx(1e-4)
    return {name: round(value * 1e6, 6) for name, value in [*found.parts.items(), ("in flight", found.in_flight)]}


def test_split_by_hand_on_a_host() -> None:
    """Catches: a moment that counts twice or not at all, or waiting that hides behind computing counted as waiting."""
    events = [
        *OWN,
        event("user_annotation", "gloo:all_reduce", 2, 9),  # for the others' data
        event("user_annotation", "gloo:all_reduce", 40, 75),
        event("cpu_op", "aten::mm", 35, 60),
        event("cpu_op", "c10d::allreduce_", 92, 95),
        event("cpu_op", "aten::mm", 110, 900),  # of no step that counts
    ]
    parts = {"data": 10, "forward": 20, "backward": 35, "optimizer": 10, "communication": 18, "other": 7}
    assert microseconds(events, on_cuda=False) == {**parts, "in flight": 38}
    assert tuple(parts) == SPLIT
    mine = operations(events, [7], on_cuda=False)
    assert [(row["name"], round(row["seconds"] * 1e6, 6)) for row in mine] == [
        ("aten::mm", 25),
        ("c10d::allreduce_", 3),
    ]


def test_split_by_hand_on_a_gpu() -> None:
    """Catches: a device's time given to what the host does meanwhile, not to what has launched it; a kernel under the
    name of an operation of another row of steps."""
    events = [
        *OWN,
        event("cpu_op", "aten::conv2d", 12, 20, **{"External id": 1}),
        event("cuda_runtime", "cudaLaunchKernel", 15, 16, correlation=1),
        event("kernel", "sgemm", 25, 50, correlation=1, **{"External id": 1}),  # the host is in backward by then
        event("cuda_driver", "cuLaunchKernel", 33, 34, correlation=2),
        event("kernel", "sgemm", 50, 60, correlation=2),
        event("kernel", "ncclDevKernel_AllReduce", 55, 80, correlation=3),
        event("kernel", "adam", 85, 95, correlation=4),  # nobody knows who began it
    ]
    parts = {"data": 10, "forward": 15 + 25, "backward": 10 + 5, "optimizer": 5, "communication": 20, "other": 10}
    assert microseconds(events, on_cuda=True) == {**parts, "in flight": 25} | {"backward": 10 + 5 + 5, "other": 5}
    again = [{**one, "ts": one["ts"] + 200, "args": dict(one["args"])} for one in events[len(OWN) :]]
    again = [event("user_annotation", "hybrid-dist: step 8", 200, 300), *again]
    again[1]["name"] = "aten::linear"
    both = joined([{"traceEvents": [dict(one) for one in events]}, {"traceEvents": again}])["traceEvents"]
    rows = {row["name"]: round(row["seconds"] * 1e6, 6) for row in operations(both, [7, 8], on_cuda=True)}
    assert rows == {
        "aten::conv2d": 12.5, "aten::linear": 12.5, "sgemm": 10, "ncclDevKernel_AllReduce": 25, "adam": 10,
    }  # fmt: skip


def test_a_trace_that_names_nobody() -> None:
    """Catches: what torch and Kineto write of a machine, in a file that is made to be given away."""
    trace = {
        "schemaVersion": 1, "host_name": "node17", "traceName": "/home/annika/x.json", "displayTimeUnit": "ms",
        "distributedInfo": {"backend": "gloo", "rank": 1, "world_size": 2, "pg_config": [{"store": "node17:29500"}]},
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 5, "tid": 0, "args": {"name": "python train.py --key s3cret"}},
            {"ph": "M", "name": "thread_name", "pid": 5, "tid": 6, "args": {"name": "thread 6 (s3cret)"}},
            {"ph": "M", "name": "thread_name", "pid": 5, "tid": 7, "args": {"name": "thread 7 (pt_autograd_0)"}},
            event("user_annotation", "load /home/annika/data/x.jpg on node17", 1, 2, path="/home/annika", size=3),
            event("cpu_op", "aten::mm", 1, 2, **{"Ev Idx": 4, "Inputs": ["/home/annika"], "Dims": [[2, 3]]}),
            {"ph": "i", "name": "[memory]", "ts": 1, "args": {"Device Type": 0, "Total Allocated": 70}},
        ],
    }  # fmt: skip
    text = json.dumps(stripped(trace, 1, ["node17", "annika"]))
    assert not [word for word in ("node17", "annika", "s3cret", "jpg", "train.py", "home") if word in text], text
    kept = json.loads(text)
    assert kept["distributedInfo"] == {"backend": "gloo", "rank": 1, "world_size": 2}
    names = [one["args"].get("name") for one in kept["traceEvents"]]
    assert names[:3] == ["rank 1", "thread 6", "thread 7 (pt_autograd_0)"]
    assert kept["traceEvents"][4]["args"] == {"Ev Idx": 4, "Dims": [[2, 3]]}
    assert allocated(kept["traceEvents"], on_cuda=False) == 70
    assert allocated(kept["traceEvents"], on_cuda=True) is None
