"""launch/slurm.sh and launch/phases.sh under a real SLURM of two nodes, which are this machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, tiny_values
from tests.distributed.running import block_pictures, expect_same_run
from tests.slurm.cluster import Cluster, Job, why_not

TWO = ("--nodes=2",)
STEPS = ("phases.0.steps=40",)
"""Long enough to be met on its way."""
SECONDS = 480
"""For a job on a busy machine, its two starts of the framework among it."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def make_config(data: Path, folder: Path) -> Path:
    values = tiny_values(data, folder)
    values["checkpoint"] = {"every_steps": 7, "keep": 2}
    folder.mkdir(exist_ok=True)
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def whole(cluster: Cluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run of all phases on two nodes, and its log."""
    folder = tmp_path_factory.mktemp("whole")
    config = make_config(tiny_data, folder)
    job = cluster.submit("--config", str(config), *STEPS, log=folder / "log", options=TWO)
    assert job.end(SECONDS) == "COMPLETED", job.text()
    return folder / "runs" / "tiny", job.text()


def status(run: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def wait_for_step(job: Job, run: Path, step: int) -> None:
    def there() -> bool:
        return (run / "trace.jsonl").exists() and (run / "trace.jsonl").read_bytes().count(b"\n") >= step

    job.wait_for(f"step {step}", there, SECONDS)


def last_line(job: Job) -> str:
    return job.text().strip().splitlines()[-1]


def test_two_nodes_train_all_phases(whole: tuple[Path, str]) -> None:
    """Catches: ranks that don't find each other, one rank twice, a launch file whose kind is lost on the way, a log
    that does not say where the run stood and stands, traces left beside the run."""
    run, text = whole
    assert status(run)["state"] == "finished"
    assert "2 × 1 processes: " in text
    assert "ZeRO 2 × 2" in text
    assert "has not begun" in text
    assert "slurm.sh: done" in text.strip().splitlines()[-1]
    assert {path.name for path in run.parent.iterdir()} == {run.name}


def test_stops_requeues_and_ends_in_the_same_bits(
    whole: tuple[Path, str], cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """Catches: a warning before the limit that loses steps or ends the job; an own requeue that a dependent job takes
    for the end; a job that is preempted and gone, or has not the same bits; scancel that does not cancel, or is not
    followed by a checkpoint; a STOP file that stays."""
    config, run = make_config(tiny_data, tmp_path), tmp_path / "runs" / "tiny"
    arguments = ("--config", str(config), *STEPS)
    job = cluster.submit(*arguments, log=tmp_path / "log", options=TWO)
    after = cluster.run(
        "sbatch", "--parsable", f"--dependency=afterok:{job.number}", "--output=/dev/null", "--wrap=true"
    )
    wait_for_step(job, run, 4)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_for("requeue", lambda: "requeued at step" in job.text(), 60)
    first = status(run)
    assert first["state"] == "stopped"
    assert f"requeued at step {first['step']} (stopped: a STOP file)" in job.text()
    assert not (run / "STOP").exists()

    job.release()
    wait_for_step(job, run, first["step"] + 4)
    assert f"start 2, 2 × 1 processes: {run} has a checkpoint of step" in job.text()
    # A job that goes first takes both nodes.
    urgent = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    cluster.run("sbatch", *urgent)
    job.wait_for("requeue", lambda: job.text().count("requeued at step") == 2, 60)
    second = status(run)["step"]
    assert second > first["step"]

    job.release()
    wait_for_step(job, run, second + 4)
    assert Job(cluster, after, tmp_path / "after").state == "PENDING"
    cluster.run("scancel", job.number)
    assert job.end(60) == "CANCELLED"
    assert "ended by SLURM (scancel, or a node that is gone) at step" in last_line(job)
    assert status(run)["state"] == "stopped"
    assert status(run)["step"] > second

    job = cluster.submit(*arguments, log=tmp_path / "log", options=TWO)
    assert job.end(SECONDS) == "COMPLETED", job.text()
    assert "slurm.sh: done" in last_line(job)
    assert job.text().count("slurm.sh: job ") == 4  # one log
    assert {path.name for path in run.parent.iterdir()} == {run.name}
    expect_same_run(run, whole[0])


def test_a_limit_that_is_too_short(whole: tuple[Path, str], cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a limit that ends a job for good, or before its checkpoint; bits that differ after it."""
    for name in ("train", "val"):
        shutil.copytree(tiny_data / name, tmp_path / "data" / name)
        shutil.copy(tiny_data / f"{name}.csv", tmp_path / "data")
    config, run = make_config(tmp_path / "data", tmp_path), tmp_path / "runs" / "tiny"
    limits = (*TWO, "--time=30", "--signal=B:USR1@15")
    arguments = ("--config", str(config), *STEPS, "data.workers=1")
    job = cluster.submit(*arguments, log=tmp_path / "log", options=limits)
    wait_for_step(job, run, 2)
    give_back = block_pictures(tmp_path)  # however fast the machine, the limit comes first
    # And however slow: it is a minute or two from here.
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={job.minutes() + 2}")
    job.wait_for("requeue", job.is_requeued, 240)
    give_back()
    at = status(run)["step"]
    assert f"requeued at step {at} (stopped: a STOP file)" in job.text()
    assert at > 0
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    job.release()
    assert job.end(SECONDS) == "COMPLETED", job.text()
    assert "slurm.sh: USR1: asking training to checkpoint and stop" in job.text()
    assert "TIME LIMIT" not in job.text()
    expect_same_run(run, whole[0])


def test_nodes_that_die(whole: tuple[Path, str], cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a job that ends with a node, whichever of them; a node's death that counts as a failed try, or leaves
    what the next start trips over; a --fresh that is followed once more after it; bits that differ."""
    config, run = make_config(tiny_data, tmp_path), tmp_path / "runs" / "tiny"
    job = cluster.submit("--config", str(config), *STEPS, "--fresh", log=tmp_path / "log", options=TWO)
    step = 0
    for node in ("n2", "n1"):  # the second one has the batch script
        wait_for_step(job, run, step + 9)
        cluster.kill_node(node)
        job.wait_for("requeue", job.is_requeued, 120)
        cluster.start_node(node)
        cluster.wait_for(
            "both nodes", lambda: cluster.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == "2", 60
        )
        step = newest_step(run)
        assert step > 0
        job.release()
    assert job.end(SECONDS) == "COMPLETED", job.text()
    assert f"has a checkpoint of step {step}" in job.text()
    assert {path.name for path in run.parent.iterdir()} == {run.name}
    expect_same_run(run, whole[0])


def newest_step(run: Path) -> int:
    return max(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").glob("[!.]*-*"))


def test_gives_up_on_what_cannot_succeed(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a job that requeues itself for ever; a reason that the log does not end with; an exit code of 0, after
    which dependent jobs would begin; a config that can't be read and is tried twice."""
    shutil.copytree(tiny_data, tmp_path / "data")
    (tmp_path / "data" / "val.csv").write_text("filename,typename\n0000.png,Zeppelin\n0000.png\n")
    config = make_config(tmp_path / "data", tmp_path)
    job = cluster.submit("--config", str(config), log=tmp_path / "log")
    job.release(SECONDS)
    assert "requeued at step 0 (it failed before training began" in job.text()
    assert job.end(SECONDS) == "FAILED"
    assert job.facts()["ExitCode"] == "1:0"
    assert "given up: 2 starts in a row without a new checkpoint (step 0)" in last_line(job)
    assert f"it failed before training began: train.py: {tmp_path / 'data' / 'val.csv'}" in last_line(job)
    assert not any(tmp_path.glob("runs/.*"))

    job = cluster.submit("--config", str(config), "train.precisoin=fp32", log=tmp_path / "log2")
    assert job.end(60) == "FAILED"
    assert "precisoin" in job.text()
    assert "not started" in last_line(job)
    assert job.facts()["ExitCode"] == "2:0"


def test_fresh_means_one_start(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a --fresh that starts over after each requeue, or whose progress is not seen; a stop by hand that is
    requeued."""
    config, run = make_config(tiny_data, tmp_path), tmp_path / "runs" / "tiny"
    arguments = ("--config", str(config), "phases.0.steps=4", "phases.1.steps=4", "phases.2.steps=400")
    job = cluster.submit(*arguments, log=tmp_path / "log")
    wait_for_step(job, run, 10)
    (run / "STOP").touch()
    assert job.end(60) == "FAILED"
    assert "somebody's STOP file" in last_line(job)

    old = run.stat().st_ino
    job = cluster.submit(*arguments, "--fresh", log=tmp_path / "log")
    job.wait_for("a new folder", lambda: run.exists() and run.stat().st_ino != old, SECONDS)
    wait_for_step(job, run, 2)
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    job.release()
    at = status(run)["step"]
    assert f"requeued at step {at} (stopped: a STOP file)" in job.text()
    wait_for_step(job, run, at + 4)
    cluster.run("scancel", job.number)
    assert job.end(60) == "CANCELLED"
    assert len(list(run.parent.glob("tiny.*"))) == 1


def test_phases_are_jobs_one_after_the_other(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: options or launch files of another phase; phases at the same time or out of order; a call again that
    begins anew, or does what is done; a failed phase whose followers wait for ever."""
    config, run = make_config(tiny_data, tmp_path), tmp_path / "runs" / "tiny"
    env = {
        "PHASE_A": "--nodes=1", "LAUNCH_A": "ddp", "PROCESSES_PER_NODE": "1",
        "PHASE_B": "--nodes=2", "LAUNCH_B": "zero1", "PHASE_C": "--nodes=2 --time=30", "LAUNCH_C": "zero3",
        "SBATCH_OPTIONS": f"--output={tmp_path}/%x.log",
    }  # fmt: skip

    def submit(*more: str) -> dict[str, Job]:
        said = cluster.run("launch/phases.sh", "--config", str(config), *more, **env)
        jobs = [line.removeprefix("phase ").split(": job ") for line in said.splitlines() if line.startswith("phase ")]
        return {phase: Job(cluster, number, tmp_path / f"tiny-{phase}.log") for phase, number in jobs}

    broken = submit("train.micro_batch_size=3")
    broken["a"].wait_for("requeue", lambda: "requeued at step 0" in broken["a"].text(), SECONDS)
    jobs = submit()
    assert [job.facts()["Reason"] for job in jobs.values()] == ["Dependency"] * 3
    broken["a"].release()
    assert broken["a"].end(SECONDS) == "FAILED"
    assert [broken[phase].end(60) for phase in "bc"] == ["CANCELLED", "CANCELLED"]
    assert [job.end(SECONDS) for job in jobs.values()] == ["COMPLETED"] * 3, [job.text() for job in jobs.values()]
    assert status(run)["reason"] == "all phases are finished"
    for phase, label in (("a", "one process"), ("b", "ZeRO 1 × 2"), ("c", "ZeRO 3 × 2")):
        text = jobs[phase].text()
        assert f"on {label}" in text
        assert text.count("slurm.sh: job ") == (3 if phase == "a" else 1)
    assert "2 × 1 processes: " in jobs["c"].text()
    assert submit() == {}


def test_the_doctor_looks_at_every_node(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a doctor that looks at one node only, or whose tasks do not find each other under a real srun."""
    config = make_config(tiny_data, tmp_path)
    command = [sys.executable, "-c", "import sys; from hybrid_dist.cli import main; sys.exit(main())"]
    doctor = [*command, "doctor", "--json", "--config", str(config)]
    out = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "--quiet", *doctor, seconds=SECONDS)
    lines = {line["check"]: line for line in json.loads(out)}
    assert lines["rendezvous"]["text"].startswith("2 tasks on ")
    assert lines["all-reduce"]["text"].startswith("2 processes over gloo")
    assert lines["alike"]["state"] == "ok"
    assert "fail" not in {line["state"] for line in lines.values()}


def test_scripts_are_clean() -> None:
    """Catches: what shellcheck knows to go wrong with names that hold spaces, with empty lists and failed commands."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for path in (ROOT / "launch").glob("*.sh")]
    assert scripts
    found = subprocess.run(
        ["shellcheck", *scripts, str(ROOT / ".ci" / "run")], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stdout
