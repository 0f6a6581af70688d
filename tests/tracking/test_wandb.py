"""wandb, offline: what it has at the end is what metrics.jsonl has, whatever happened on the way."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import train
from hybrid_dist.tracking import wandb_sink
from hybrid_dist.training import phase as phase_module
from hybrid_dist.training.objective import MicroLoss, Objective
from tests.conftest import ROOT, environment, read_lines, tiny_values
from tests.distributed.running import Running, without_times
from tests.tracking.stand_in import StandIn

KEY, SECRET = "5b" * 20, "made-up-token-that-nobody-may-read"
PHASES = [
    {"name": "a", "trainable": ["heads", "fusion"], "steps": 5, "lr": 1e-3},
    {"name": "b", "trainable": ["all"], "steps": 6, "lr": 1e-3},
]


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What must not be found in any file."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ERROR_REPORTING"):  # which a run sets for itself
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def write_config(data: Path, folder: Path, wandb: str, phases: list[dict[str, Any]] = PHASES) -> Path:
    values = tiny_values(data, folder) | {"phases": phases, "checkpoint": {"every_steps": 3, "keep": 3}}
    values["tracking"] |= {"log_every": 1, "wandb": wandb}
    folder.mkdir(parents=True, exist_ok=True)
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs train.py's main here."""

    def run(config: Path, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), *arguments])
        return train.main()

    return run


@pytest.fixture(scope="module")
def plain(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without wandb, in a process that must not load it."""
    folder = tmp_path_factory.mktemp("plain")
    config = write_config(tiny_data, folder, "off")
    code = "import sys, train; code = train.main(); sys.exit('wandb' in sys.modules or code)"
    command = [sys.executable, "-c", code, "--config", str(config)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here: a CPU's sums depend on it
    done = subprocess.run(command, cwd=ROOT, env=environment() | threads, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs" / "tiny"


def starts(run: Path) -> list[Path]:
    """wandb's folders, in the order in which `wandb sync` takes them."""
    return sorted((run / "wandb").glob("offline-run-*"))


@functools.cache
def inspect(folder: Path) -> list[dict[str, Any]]:
    """A folder's records, by wandb's own reader; once the run is over."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, env=environment(), timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, (done.stderr, done.stdout[-1000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[Any]:
    return [record[kind] for record in records if record["type"] == kind]


def expect_each_line_once(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Each line of metrics.jsonl is a row, once, in order, with its values. Returns the rows with their folders."""
    rows = [(path, entry["item"]) for path in starts(run) for entry in of_kind(inspect(path), "history")]
    lines = read_lines(run / "metrics.jsonl")
    assert [row["_step"] for _, row in rows] == list(range(len(lines)))
    for (_, row), line in zip(rows, lines, strict=True):
        want = {key: value for key, value in line.items() if value is not None and key != "time"}
        assert {key: row.get(key) for key in want} == want
    return rows


def expect_media(folder: Path, row: dict[str, Any]) -> None:
    """A validation's charts, and its table of pictures with the pictures in it."""
    for chart in ("confusion_type", "classes_airline", "scatter_clarity", "scatter_block"):
        assert (folder / "files" / row[f"val/{chart}_table.path"]).is_file()
    table = json.loads((folder / "files" / row["val/pictures.path"]).read_text())
    assert table["columns"][:5] == ["picture", "why", "filename", "loss", "confidence"]
    assert {"type_label", "type_prediction", "type_probability", "block_prediction"} <= set(table["columns"])
    assert {cells[1] for cells in table["data"]} == {"worst", "sample", "most uncertain"}
    assert len(table["data"]) == 24


def expect_no_secret(run: Path) -> None:
    """Neither the key nor the environment, nor how the run was started or where."""
    names = [KEY, SECRET, "--config", *([socket.gethostname()] if len(socket.gethostname()) > 5 else [])]
    files = [path for path in (run / "wandb").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in [*files, run / "config.yaml"]:
        data = path.read_bytes()
        assert not [name for name in names if name.encode() in data], path
    assert not list((run / "wandb").rglob("wandb-metadata.json")) + list((run / "wandb").rglob("requirements.txt"))


@pytest.mark.timeout(200)
def test_killed_twice(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: steps twice or not at all after kills, two runs of one, lost pictures, a key or a host in a file."""
    phases = [{**PHASES[0], "steps": 9}, {**PHASES[1], "steps": 26}]
    config = write_config(tiny_data, tmp_path, "offline", phases)
    run = tmp_path / "runs" / "tiny"
    began = []
    for steps in (8, 19):
        began.append(time.time())
        with Running(config, run, "ddp") as training:
            assert training.wait_for(f"{steps} steps", lambda: training.steps() >= steps)  # noqa: B023
            time.sleep(0.3)
            training.kill_all()
    began.append(time.time())
    with Running(config, run, "ddp") as training:
        assert training.end(60) == 0, training.tail()
    rows = expect_each_line_once(run)
    assert len(starts(run)) == 3
    records = [inspect(path) for path in starts(run)]
    ids = {entry["run_id"] for found in records for entry in of_kind(found, "run")}
    state = json.loads(next(run.glob("checkpoints/b-35/state.json")).read_text())
    assert ids == {state["wandb_id"]}
    for (path, row), line in zip(rows, read_lines(run / "metrics.jsonl"), strict=True):
        # A later start sends what a killed one could not; pictures are gone with the start that judged.
        own = line["time"] >= began[starts(run).index(path)]
        assert ("val/pictures.path" in row) == ("val/score" in row and own)
        if "val/pictures.path" in row:
            expect_media(path, row)
    assert "val/pictures.path" in rows[-1][1]
    expect_defined(records[-1])
    expect_no_secret(run)
    expect_synced(run, ids)


def expect_synced(run: Path, ids: set[str]) -> None:
    """`wandb sync` makes one run of all folders, with each line once."""
    with StandIn() as server:
        command = [sys.executable, "-m", "wandb", "sync", *map(str, starts(run))]
        variables = environment() | {"WANDB_BASE_URL": server.address, "WANDB_ERROR_REPORTING": "false"}
        variables.pop("WANDB_MODE")
        done = subprocess.run(command, env=variables, timeout=300, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert server.runs == ids
        lines = read_lines(run / "metrics.jsonl")
        assert [row["_step"] for row in server.rows] == list(range(len(lines)))
        assert [(row["step"], "val/score" in row) for row in server.rows] == [
            (line["step"], "val/score" in line) for line in lines
        ]
        assert "model" in server.artifacts


def expect_defined(records: list[dict[str, Any]]) -> None:
    """Axes, config, the machine's load, the model, and the best, all in the last start's file."""
    metrics = {entry.get("name") or entry.get("glob_name"): entry for entry in of_kind(records, "metric")}
    assert {metrics[name]["step_metric"] for name in ("train/*", "val/*", "perf/*", "val/score")} == {"step"}
    assert metrics["val/score"]["summary"]["max"] and metrics["val/block_mae"]["summary"]["min"]
    config = of_kind(records, "run")[0]["config"]["update"]
    assert config["train"]["global_batch_size"] == 16 and config["phase_begins"] == {"a": 1, "b": 10}
    assert of_kind(records, "stats")
    assert [entry["type"] for entry in of_kind(records, "artifact")].count("model") == 1
    assert [entry["level"] for entry in of_kind(records, "alert")] == ["INFO"]
    assert of_kind(records, "exit")[0]["exit_code"] == 0
    summary = {key: value for entry in of_kind(records, "summary") for key, value in entry["update"].items()}
    assert summary["best/val/score"] > 0 and "best/step" in summary


class Unreliable:
    """Some of a function's calls raise, half of them after they have done it."""

    def __init__(self, function: Callable[..., Any], chance: random.Random):
        self.function, self.chance, self.raised = function, chance, 0

    def __get__(self, owner: Any, _: Any = None) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        luck = self.chance.random()
        if luck < 0.15:
            self.raised += 1
            raise ConnectionError("refused")
        found = self.function(*args, **kwargs)
        if luck > 0.85:
            self.raised += 1
            raise TimeoutError("too late")
        return found


@pytest.mark.timeout(120)
def test_unreliable(
    tiny_data: Path, tmp_path: Path, plain: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a failure of wandb that ends a training, changes its losses, or loses or doubles a line."""
    from wandb.sdk.wandb_run import Run

    chance = random.Random(5)
    methods = ("log", "define_metric", "alert")
    patched = [Unreliable(getattr(Run, name), chance) for name in methods]
    for name, method in zip(methods, patched, strict=True):
        monkeypatch.setattr(Run, name, method)
    assert call(write_config(tiny_data, tmp_path, "offline")) == 0
    run = tmp_path / "runs" / "tiny"
    assert sum(method.raised for method in patched) > 5
    rows = expect_each_line_once(run)
    for path, row in rows:
        if "val/score" in row:
            expect_media(path, row)
    assert without_times(run) == without_times(plain)
    assert (run / "trace.jsonl").read_text() == (plain / "trace.jsonl").read_text()


HANGING = """
import sys, threading, time
import train
from hybrid_dist.tracking import wandb_sink
from wandb.sdk.wandb_run import Run

log, close, calls = Run.log, wandb_sink.Wandb.close, []

def hang(self, *args, **kwargs):
    calls.append(args)
    if len(calls) > 2:
        threading.Event().wait()
    log(self, *args, **kwargs)

def timed(self):
    time.sleep(0.5)  # the two rows that came through are in the file by then
    began = time.monotonic()
    close(self)
    print(f"closed in {time.monotonic() - began:.2f} s")

Run.log, wandb_sink.Wandb.close, wandb_sink.PATIENCE = hang, timed, 1.0
train._leave(train._train(train.Stop()))
"""


@pytest.mark.timeout(150)
def test_hanging(tiny_data: Path, tmp_path: Path, plain: Path, call: Callable[..., int]) -> None:
    """Catches: a hung wandb that holds up steps or an end, or costs lines that the next start could send."""
    config, run = write_config(tiny_data, tmp_path, "offline"), tmp_path / "runs" / "tiny"
    command = [sys.executable, "-c", HANGING, "--config", str(config), "--phase", "a"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env=environment() | threads, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("warning: wandb does not answer") == 1
    found = re.search(r"closed in ([\d.]+) s", done.stdout)
    assert found and float(found[1]) < 3
    assert call(config) == 0
    expect_each_line_once(run)
    assert len(starts(run)) == 2
    assert without_times(run) == without_times(plain)
    assert (run / "trace.jsonl").read_text() == (plain / "trace.jsonl").read_text()


@pytest.mark.timeout(120)
def test_crash(tiny_data: Path, tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a crash without an alert; an id that is lost with a start that left no checkpoint."""

    def crash(*_: Any) -> None:
        raise RuntimeError("a made-up crash")

    config, run = write_config(tiny_data, tmp_path, "offline", [{**PHASES[0], "steps": 3}]), tmp_path / "runs" / "tiny"
    with monkeypatch.context() as broken:
        broken.setattr(phase_module, "train_step", crash)
        assert call(config) == 1
    assert not list(run.glob("checkpoints/a-*"))
    assert call(config) == 0
    crashed, finished = (inspect(path) for path in starts(run))
    alert = of_kind(crashed, "alert")[0]
    assert (alert["level"], alert["title"]) == ("ERROR", "tiny has crashed") and "made-up" in alert["text"]
    assert of_kind(crashed, "exit")[0]["exit_code"] == 1
    assert of_kind(finished, "alert")[0]["title"] == "tiny is finished"
    assert of_kind(crashed, "run")[0]["run_id"] == of_kind(finished, "run")[0]["run_id"]
    expect_each_line_once(run)


STUCK = """
import time
import train
from hybrid_dist.training import phase

phase.train_step = lambda *_: time.sleep(1000)
train._leave(train._train(train.Stop()))
"""


@pytest.mark.timeout(200)
def test_bad_steps(tiny_data: Path, tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: bad steps without an alert; lines that stand twice, or are missing, where a phase has gone back."""
    make_step, made = phase_module.train_step, 0

    class Bad(Objective):
        def __call__(self, *arguments: Any) -> MicroLoss:
            micro = super().__call__(*arguments)
            return replace(micro, shares=micro.shares * float("nan"))

    def step(engine: Any, objective: Objective, *rest: Any) -> Any:
        nonlocal made
        made += 1
        return make_step(engine, Bad(objective.tasks) if made in (6, 7) else objective, *rest)

    monkeypatch.setattr(phase_module, "train_step", step)
    config, run = write_config(tiny_data, tmp_path, "offline", [{**PHASES[0], "steps": 9}]), tmp_path / "runs" / "tiny"
    assert call(config, "train.max_bad_steps=2", "checkpoint.every_steps=2") == 0
    assert made == 7 + 5, "from step 4 once more"
    alerts = [alert for path in starts(run) for alert in of_kind(inspect(path), "alert")]
    assert [(alert["level"], alert["title"]) for alert in alerts] == [
        ("WARN", "tiny needs a look"), ("INFO", "tiny is finished"),
    ]  # fmt: skip
    assert "2 bad steps in a row, the last is step 7" in alerts[0]["text"] and "back to a-4" in alerts[0]["text"]
    assert len(starts(run)) == 2
    expect_each_line_once(run)


@pytest.mark.timeout(100)
def test_stuck(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a run that is ended because it hangs, of which nobody is told."""
    config = write_config(tiny_data, tmp_path, "offline")
    command = [sys.executable, "-c", STUCK, "--config", str(config), "train.stall_timeout=2"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), timeout=90, capture_output=True, text=True)
    assert done.returncode == 70, done.stderr[-3000:]
    records = inspect(starts(tmp_path / "runs" / "tiny")[0])
    alert = of_kind(records, "alert")[0]
    assert (alert["level"], alert["title"]) == ("ERROR", "tiny is stuck") and "no progress for 2 s" in alert["text"]
    assert of_kind(records, "exit")[0]["exit_code"] == 1


def test_not_usable(
    tiny_data: Path, tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Catches: a training that ends because wandb is not installed or does not begin, or says so more than once."""
    import wandb

    def refuse(**_: Any) -> None:
        raise ConnectionError("no service")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(wandb_sink, "PAUSE", 0.001)
    config = write_config(tiny_data, tmp_path, "offline", [{**PHASES[0], "steps": 2}])
    assert call(config) == 0
    assert capfd.readouterr().err.count("warning: wandb") == 1
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert call(config, "--fresh") == 0
    assert capfd.readouterr().err.count("warning: wandb can't be used") == 1


@pytest.mark.timeout(150)
def test_online(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: online, steps twice or not at all after a kill; a stop that waits for the network; a key in a file."""
    config, run = write_config(tiny_data, tmp_path, "online"), tmp_path / "runs" / "tiny"
    with StandIn() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        with Running(config, run, None) as training:
            assert training.wait_for("8 steps", lambda: training.steps() >= 8)
            training.kill_all()
        with Running(config, run, None) as training:
            assert training.end(60) == 0, training.tail()
        assert "warning: wandb" not in training.tail()
        lines = read_lines(run / "metrics.jsonl")
        assert [row["step"] for row in server.rows] == [line["step"] for line in lines]
        assert [row["_step"] for row in server.rows] == list(range(len(lines)))
        assert server.runs == {(run / "wandb" / "run-id").read_text().strip()}
        assert server.alerts == ["tiny is finished"] and "model" in server.artifacts
    expect_no_secret(run)


@pytest.mark.parametrize(
    ("wanted", "variables", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "off"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
        ("off", {"WANDB_MODE": "online"}, "off"),
    ],
)
def test_mode(
    wanted: str, variables: dict[str, str], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a run that goes online where nobody is logged in, or offline where somebody is."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_sink.choose_mode(wanted) == mode


def test_a_login_at_a_server_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: `wandb login --host` that is not seen, for its server stands in wandb's settings alone."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "netrc").write_text("machine wandb.example login user password 0123\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    assert not wandb_sink.logged_in()
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example\n")
    assert wandb_sink.logged_in()


def test_online_without_a_login(
    tiny_data: Path, tmp_path: Path, call: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a job that waits for somebody to type a key."""
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert call(write_config(tiny_data, tmp_path, "online")) == 2
    assert not (tmp_path / "runs").exists()
