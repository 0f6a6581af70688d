"""Processes that meet and add up numbers: on this machine alone, or one per task under srun."""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hybrid_dist.distributed import Control, differences
from hybrid_dist.distributed.launch import common_facts
from hybrid_dist.distributed.meeting import choose_interface
from hybrid_dist.doctor.line import Line, fail, ok, warn
from hybrid_dist.doctor.storage import SKEW

PATIENCE = 45.0
"""Seconds until processes that do not meet are given up."""
NUMBERS = 16 << 20
"""Of an all-reduce, fp32."""
TURNS = 5


@dataclass(frozen=True)
class Place:
    """A process among others that are about to meet."""

    rank: int
    world_size: int
    head: str
    port: int

    @classmethod
    def under_srun(cls) -> Place | None:
        """This task's, if `srun` has started several."""
        tasks = int(os.environ.get("SLURM_NTASKS", "1"))
        if "SLURM_STEP_ID" not in os.environ or tasks < 2:
            return None
        nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
        head = _scontrol("show", "hostnames", nodes).split()[0]
        # The address under which SLURM itself reaches it; where a site sets none, that is its name.
        address = re.search(r"\bNodeAddr=(\S+)", _scontrol("--oneliner", "show", "node", head))
        # From the step's number: another job on these nodes has another port, and so has a second try.
        port = 20_000 + (int(os.environ["SLURM_JOB_ID"]) * 31 + int(os.environ["SLURM_STEP_ID"])) % 20_000
        return cls(
            int(os.environ["SLURM_PROCID"]), tasks, os.environ.get("HEAD", address[1] if address else head), port
        )


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout


def join(place: Place) -> None:
    """Meet the others, over gloo: what they have to tell does not need a GPU.

    Raises:
        RuntimeError: they are not all there within `PATIENCE` seconds.
    """
    choose_interface(place.head, place.port)
    dist.init_process_group(
        "gloo", f"tcp://{place.head}:{place.port}", rank=place.rank, world_size=place.world_size,
        timeout=timedelta(seconds=PATIENCE),
    )  # fmt: skip


def _has_own_gpu(place: Place) -> bool:
    """Whether there is one for each process of this machine, as NCCL wants it."""
    local = int(os.environ.get("SLURM_NTASKS_PER_NODE", os.environ.get("LOCAL_WORLD_SIZE", place.world_size)))
    return torch.cuda.device_count() >= local


def all_reduce(place: Place, cuda: bool) -> Line:
    """Median bytes a second that a rank sends in an all-reduce (bus bandwidth as NCCL's tests count it), and whether
    the sum was right.

    Args:
        cuda: Over NCCL; all ranks must have a GPU of their own. Else over gloo, as training would.
    """
    group: Any = None
    if cuda:
        torch.cuda.set_device(place.rank % torch.cuda.device_count())
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=PATIENCE))
    world, rates, right = place.world_size, [], True
    for turn in range(TURNS + 1):
        numbers = torch.full((NUMBERS,), float(place.rank + turn), device="cuda" if cuda else "cpu")
        began = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        total = float(numbers[-1])  # waits for the device
        rates.append(2 * (world - 1) / world * numbers.nbytes / (time.perf_counter() - began))
        right &= total == float(sum(rank + turn for rank in range(world)))
    text = f"{world} processes over {'nccl' if cuda else 'gloo'}: {statistics.median(rates[1:]) / 1e9:.2f} GB/s"
    if not right:
        return fail("all-reduce", f"{text}, and the sum is wrong", "a broken link or memory: try other machines")
    return ok("all-reduce", text)


def local_line(processes: int) -> Line:
    """Start so many processes on this machine, let them meet, and measure."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "hybrid_dist.doctor.together"]
    environment = {**os.environ, "LOCAL_WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(processes), "127.0.0.1", str(port)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=2 * PATIENCE) for process in started]
    except subprocess.TimeoutExpired:
        return fail("all-reduce", f"{processes} processes do not get through it", _REMEDY)
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        errors = [error.strip().splitlines() for _, error in outputs if error.strip()]
        return fail("all-reduce", errors[0][-1] if errors else "a process died", _REMEDY)
    return Line(**json.loads(outputs[0][0]))


_REMEDY = "NCCL_DEBUG=INFO, or GLOO_SOCKET_IFNAME=lo, before the same command tells more"


def together_lines(place: Place, own: list[Line], same: dict[str, Any]) -> list[Line] | None:
    """Under srun: meet, compare, and bring every host's lines to rank 0 (None elsewhere).

    Args:
        own: What this task has found about its host.
        same: What must be equal on all of them, by name: config and data.
    """
    try:
        join(place)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        remedy = "see that the nodes reach each other; HEAD=ADDRESS, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME may help"
        return [fail("rendezvous", f"rank {place.rank} at {place.head}:{place.port}: {reason}", remedy)]
    control = Control(place.rank, place.world_size, timedelta(seconds=PATIENCE))
    control.barrier()
    facts: dict[str, Any] = {"lines": [vars(line) for line in own], "time": time.time(), "host": socket.gethostname()}
    has_gpu = _has_own_gpu(place)
    facts["same"] = {**common_facts(has_gpu), **same}
    everyone = control.to_all(facts)
    # Where some have GPUs and some have none, NCCL would wait for ever; that they differ is said.
    cuda = all(other["same"]["device"] == "cuda" for other in everyone)
    line = all_reduce(place, cuda)
    dist.destroy_process_group()
    if place.rank > 0:
        return None
    return [*_per_host(everyone), *_compare(everyone), line]


def _per_host(everyone: list[dict[str, Any]]) -> list[Line]:
    hosts = {facts["host"]: facts["lines"] for facts in reversed(everyone)}
    return [Line(**{**line, "host": host}) for host, lines in sorted(hosts.items()) for line in lines]


def _compare(everyone: list[dict[str, Any]]) -> list[Line]:
    lines = [ok("rendezvous", f"{len(everyone)} tasks on {len({facts['host'] for facts in everyone})} hosts have met")]
    times = [facts["time"] for facts in everyone]
    spread = max(times) - min(times)
    if spread > SKEW:
        lines.append(warn("clocks", f"they are {spread:.0f} s apart", "have all follow an NTP server"))
    else:
        lines.append(ok("clocks", f"within {spread:.1f} s"))
    found = differences(everyone)
    if found:
        lines.append(fail("alike", found, "install, check out and mount the same everywhere"))
    else:
        lines.append(ok("alike", "versions, code, config and tables are the same for all tasks"))
    return lines


def main() -> int:
    """A process of `local_line`."""
    rank, world, head, port = sys.argv[1:]
    place = Place(int(rank), int(world), head, int(port))
    join(place)
    line = all_reduce(place, _has_own_gpu(place))
    dist.destroy_process_group()
    print(json.dumps(vars(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
