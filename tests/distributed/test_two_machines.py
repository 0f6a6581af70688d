"""Two machines without a scheduler: two network namespaces, joined by one cable that can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import ROOT, environment, launch, tiny_values
from tests.distributed.running import Running, expect_same_run

HEAD = "10.213.77.1"
SECONDS = 300
"""For a start of both on a busy machine."""


class Machine(Running):
    """`launch/local.sh` on one of the two."""

    def __init__(
        self, cable: Cable, number: int, run: Path, *arguments: str, tree: Path = ROOT,
        script: str = "launch/local.sh", **env: str,
    ):  # fmt: skip
        self.run, self.seen = run, set()
        self.log = run.parent.parent / f"machine-{cable.started}-{number}.log"
        cable.started += 1
        own = {"MACHINES": "2", "MACHINE": str(number), "HEAD": HEAD, "PYTHON": sys.executable, "WAIT": "60"}
        with self.log.open("wb") as log:
            self.launcher = subprocess.Popen(
                ["ip", "netns", "exec", cable.names[number], script, *arguments], cwd=tree,
                env={**environment(), **own, "PYTHONPATH": str(tree), **env},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        return self.log.read_text(errors="replace")


class Cable:
    """Two machines, 10.213.77.1 and .2, and what joins them."""

    def __init__(self) -> None:
        self.names = [f"hd{os.getpid()}-{number}" for number in (0, 1)]
        self.started = 0

    def __enter__(self) -> Cable:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "hd0", "netns", self.names[0], "type", "veth", "peer", "name", "hd1", "netns", self.names[1])
        for number, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"10.213.77.{number + 1}/24", "dev", f"hd{number}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"hd{number}", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=20)

    def set(self, state: str) -> None:
        """Pull it out (`down`) or plug it in (`up`), at machine 1."""
        ip("-n", self.names[1], "link", "set", "hd1", state)

    def both(self, run: Path, *arguments: str, **env: str) -> list[Machine]:
        return [Machine(self, number, run, *arguments, **env) for number in (0, 1)]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=20, capture_output=True)


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        made = Cable().__enter__()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode(errors='replace').strip()}")
    try:
        yield made
    finally:
        made.__exit__()


def make_config(data: Path, folder: Path) -> Path:
    values = tiny_values(data, folder)
    values["checkpoint"] = {"every_steps": 7, "keep": 2}
    for phase in values["phases"]:
        phase["steps"] = 40
    YAML().dump(values, folder / "config.yaml")
    return folder / "config.yaml"


def ends(*machines: Machine, seconds: float = SECONDS) -> list[int]:
    """Their exit codes; whatever happens, nothing of them stays."""
    try:
        return [machine.end(seconds) for machine in machines]
    finally:
        for machine in machines:
            machine.kill_all()


def test_a_cable_that_is_pulled(cable: Cable, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: ranks that don't find each other's interface; a hang, or an end with 0, where the other machine is gone;
    steps that are lost or made twice over such an end."""
    config = make_config(tiny_data, tmp_path)
    launch("--config", str(config), f"run.dir={tmp_path / 'whole'}", config_file="zero2")
    run = tmp_path / "runs" / "tiny"

    machines = cable.both(run, "--config", str(config), "train.stall_timeout=10")
    assert machines[0].wait_for("a step", lambda: machines[0].steps() > 20, SECONDS), machines[0].tail()
    cable.set("down")
    began = time.monotonic()
    try:
        codes = ends(*machines)
    finally:
        cable.set("up")
    # The watch's 10 s, then what it gives the others to write their stacks, and the launcher its end.
    assert time.monotonic() - began < 60
    assert 0 not in codes
    status = machines[0].status()
    assert status["state"] == "failed", (status, machines[0].tail())
    assert "stuck: no progress for 10 s at rank" in status["reason"]

    machines = cable.both(run, "--config", str(config))
    assert ends(*machines) == [0, 0], machines[0].tail()
    assert ", from step" in machines[0].text(), machines[0].text()
    expect_same_run(run, tmp_path / "whole" / "tiny")


def test_what_is_wrong_is_named_at_the_start(cable: Cable, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a start that hangs, or trains something else on each machine, where configs or code differ, a machine's
    number is typed twice, a port is another job's; a job that another one on its port breaks."""
    config = make_config(tiny_data, tmp_path)
    run, tree = tmp_path / "runs" / "tiny", tmp_path / "tree"
    for name in ("hybrid_dist", "launch"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tree)
    with (tree / "hybrid_dist" / "errors.py").open("a") as file:
        file.write("# another version\n")

    first = Machine(cable, 0, run, "--config", str(config))
    other = Machine(cable, 1, run, "--config", str(config), "phases.0.lr=5e-3", tree=tree)
    assert 0 not in ends(first, other)
    assert "rank 1 on" in first.text()
    assert "hybrid-dist's code is" in first.text()
    assert "phases.0.lr is 0.001 on rank 0 and 0.005 there" in first.text()
    assert not run.exists()

    good = cable.both(run, "--config", str(config), "phases.0.steps=400")
    try:
        assert good[0].wait_for("a step", lambda: good[0].steps() > 2, SECONDS), good[0].tail()
        late = cable.both(run, "--config", str(config), "run.name=two")
        assert 0 not in ends(*late)
        assert f"PORT=29500 on {HEAD} is taken" in late[0].text()
        assert "is rank 1 already. Two jobs on one port" in late[1].text()
        (run / "STOP").touch()
        ends(*good)
    finally:
        for machine in good:
            machine.kill_all()
    assert good[0].status()["state"] == "stopped", good[0].tail()


def test_a_disk_of_its_own(cable: Cable, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: half of each checkpoint on a disk that the other machine does not see; the file that shows it left."""
    config = make_config(tiny_data, tmp_path)
    run = tmp_path / "runs" / "tiny"
    run.parent.mkdir()
    # A machine's mounts are its own, too.
    mounting = f"mount -t tmpfs none {run.parent} && exec launch/local.sh"
    (tmp_path / "local.sh").write_text(f'#!/bin/sh\n{mounting} "$@"\n')
    (tmp_path / "local.sh").chmod(0o755)
    first = Machine(cable, 0, run, "--config", str(config))
    other = Machine(cable, 1, run, "--config", str(config), script=str(tmp_path / "local.sh"))
    assert 0 not in ends(first, other)
    assert "doesn't see what rank 0 writes into" in first.text()
    assert "rank 1 on" in first.text()
    assert not list(run.parent.iterdir())


def test_machines_that_do_not_meet(cable: Cable, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a machine that waits in silence for one that is not there; an end with 0; a port that is heard, and
    ranks that can't connect: a hang until the time-out of the first collective."""
    config = make_config(tiny_data, tmp_path)
    run = tmp_path / "runs" / "tiny"
    cable.set("down")
    try:
        machine = Machine(cable, 1, run, "--config", str(config), WAIT="20")
        assert ends(machine) == [2]
    finally:
        cable.set("up")
    assert f"waits for machine 0 at {HEAD}:29500:" in machine.text()
    assert f"nobody at {HEAD}:29500 for 20 s" in machine.text()

    alone = Machine(cable, 0, run, "--config", str(config), WAIT="5")
    assert ends(alone) != [0]
    assert "1/2 clients joined" in alone.text()

    # A firewall, or a machine whose name stands for its loopback address: both can be asked for.
    patience = tmp_path / "sitecustomize.py"
    patience.write_text("import hybrid_dist.distributed.meeting as meeting\nmeeting.CONNECT = 8.0\n")
    path = f"{tmp_path}:{ROOT}"
    lost = cable.both(run, "--config", str(config), GLOO_SOCKET_IFNAME="lo", PYTHONPATH=path)
    assert 0 not in ends(*lost)
    for number, machine in enumerate(lost):
        assert f"rank {number} on" in machine.text()
        assert "has no connection with them over lo" in machine.text()
    assert not run.exists()
