"""A real SLURM with two nodes, both this machine: daemons, keys and logs of its own in a folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MpiDefault=none
KillWait={kill_wait}
SlurmdTimeout=12
SchedulerParameters=sched_interval=2,batch_sched_delay=1,bf_interval=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 MaxTime=INFINITE GraceTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=2 MaxTime=INFINITE
"""


def why_not() -> str | None:
    """Why there can be no SLURM here, if so."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} not found): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """Started with `with`; ended with its jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        own = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path(), "PYTHON": sys.executable}
        self.env = {**environment(), **own}
        # Of a job that the tests themselves may be in.
        for name in [name for name in self.env if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.env[name]
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        host = socket.gethostname().partition(".")[0]
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(
            CONF.format(folder=self.folder, host=host, ports=_free_ports(3), kill_wait=30)
        )
        # An empty one: no limits by cgroups, which a container has no say in.
        (self.folder / "cgroup.conf").write_text("")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in files.items()]
        # --force: a temporary folder is readable by others, which munged does not like.
        self._start("munged", "--foreground", "--force", *options)
        self.wait_for("munged", (self.folder / "munge.socket").exists, 20)
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Until both could take a job."""
        self.wait_for(
            "two idle nodes", lambda: self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == "2", 60
        )

    def _start(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self.daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True))

    def kill_node(self, node: str) -> None:
        """As if its power were cut: its daemon and whatever runs there are gone, and say nothing to anybody."""
        (daemon,) = [one for one in self.daemons if one.args == _slurmd(node)]
        self.daemons.remove(daemon)
        tasks = [task for task in self._strays() if _variable(task, "SLURMD_NODENAME") == node]
        above = {parent for task in tasks for parent in task.parents() if parent.name().startswith("slurmstepd")}
        doomed = [*above, *tasks, psutil.Process(daemon.pid)]
        for process in doomed:  # all stand still before the first one goes: nobody sees another's end
            _ignoring_gone(process.suspend)
        for process in doomed:
            _ignoring_gone(process.kill)
        daemon.wait()

    def start_node(self, node: str) -> None:
        """Power is back."""
        self._start(*_slurmd(node))

    def __exit__(self, *_: Any) -> None:
        """Jobs first, then what has kept them; whatever a daemon has started goes with it."""
        if len(self.daemons) > 1:
            self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
        below = [child for daemon in self.daemons for child in _children(daemon.pid)]
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in {*below, *self._strays()}:
            _ignoring_gone(process.kill)

    def _strays(self) -> list[psutil.Process]:
        """What this cluster has started and lost: slurmd lets go of its steps."""
        own = self.env["SLURM_CONF"]
        return [process for process in psutil.process_iter() if _variable(process, "SLURM_CONF") == own]

    def run(self, *command: str, check: bool = True, seconds: float = 60, **env: str) -> str:
        """A command's standard output."""
        done = subprocess.run(
            command, cwd=ROOT, env={**self.env, **env}, timeout=seconds, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: str, log: Path, options: tuple[str, ...] = (), **env: str) -> Job:
        """`sbatch launch/slurm.sh` with these arguments."""
        options = ("--parsable", f"--output={log}", *options)
        return Job(self, self.run("sbatch", *options, "launch/slurm.sh", *arguments, **env), log)

    def wait_for(self, what: str, test: Callable[[], Any], seconds: float) -> None:
        """Until `test` holds; fails after `seconds`, or when a daemon is gone."""
        until = time.monotonic() + seconds
        while not test():
            gone = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            if gone or time.monotonic() > until:
                logs = "\n".join(
                    f"{log}:\n{log.read_text(errors='replace')[-2000:]}" for log in self.folder.glob("*.log")
                )
                pytest.fail(f"waited {seconds} s for {what}; daemons gone: {gone}\n{logs}")
            time.sleep(0.2)


class Job:
    """One that has been submitted."""

    def __init__(self, cluster: Cluster, number: str, log: Path):
        self.cluster, self.number, self.log, self.restarts = cluster, number, log, 0

    def facts(self) -> dict[str, str]:
        """As `scontrol show job` has them."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        return dict(pair.partition("=")[::2] for pair in shown.split())

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    def wait_for(self, what: str, test: Callable[[], Any], seconds: float) -> None:
        """Until `test` holds; fails after `seconds`, with the log."""
        until = time.monotonic() + seconds
        while not test():
            if time.monotonic() > until:
                pytest.fail(
                    f"waited {seconds} s for {what} of job {self.number}: {self.facts()}\n{self.text()[-4000:]}"
                )
            time.sleep(0.2)

    def release(self, seconds: float = 90) -> None:
        """Once it has been requeued, one time more, let it begin soon: by itself it would after two minutes.

        Not at once: a node takes no job in the second in which it has ended it.
        """
        self.wait_for("requeue", self.is_requeued, seconds)
        self.restarts += 1
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now+3")

    def end(self, seconds: float) -> str:
        """Its last state, once it has ended for good."""
        self.wait_for("the end", lambda: self.state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), seconds)
        return self.state

    def minutes(self) -> int:
        """Whole ones that this start has run."""
        hours, minutes, _ = self.facts()["RunTime"].split(":")
        return int(hours) * 60 + int(minutes)

    def is_requeued(self) -> bool:
        """Once more than it was released."""
        facts = self.facts()
        return facts["JobState"] == "PENDING" and int(facts["Restarts"]) > self.restarts

    def text(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _slurmd(node: str) -> tuple[str, ...]:
    return ("slurmd", "-D", "-N", node)


def _variable(process: psutil.Process, name: str) -> str | None:
    try:
        return process.environ().get(name)
    except psutil.Error:
        return None


def _ignoring_gone(call: Callable[[], Any]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        call()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
