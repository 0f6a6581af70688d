"""What `hybrid-dist plan` foretells beside what a training takes, for real, in processes on the CPU.

    python benchmarks/plan_memory.py --config configs/small.yaml --launch ddp zero1 zero2 zero3 [--phase c] [--json]

Every launch file starts two processes, which make three optimizer steps of random pictures. States are counted by
walking the engine's tensors, storage by storage. The peak is what torch's allocator reports over a step: a process's
resident memory would tell less, for pages of a buffer that nobody has written to are not resident, while a GPU hands
all of them out. Interpreter and libraries, oneDNN's scratch memory and what malloc keeps are not in it, as
they are not in the plan for the CPU that stands beside it. What is sent in a step is counted at the collectives.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrid_dist.config import Config, load_config
from hybrid_dist.data.dataset import Batch
from hybrid_dist.distributed import Engine, Topology, leave, make_engine, start
from hybrid_dist.model.hybrid import build_model
from hybrid_dist.plan import Planner
from hybrid_dist.plan.split import ASSUMED
from hybrid_dist.training.objective import Objective
from hybrid_dist.training.optim import param_groups, peak_rates
from hybrid_dist.training.step import train_step
from hybrid_dist.training.tasks import make_tasks

STEPS = 3
MEASURED = 2
"""The last so many; before, the optimizer has no state, and DeepSpeed does not know the order of the modules."""
MARK = "a measured step"
KINDS = ("parameters", "gradients", "optimizer")


def classes(config: Config) -> dict[str, int]:
    return {name: ASSUMED for name, task in config.tasks.items() if task.kind == "classification"}


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Address and bytes of each storage behind the tensors."""
    found = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def parameter_storages(engine: Engine) -> dict[int, int]:
    parameters = list(engine.model.parameters())
    parts = [getattr(parameter, "ds_tensor", None) for parameter in parameters]
    return storages([*parameters, *parts, *engine.model.buffers()])


def optimizer_storages(engine: Engine) -> dict[int, int]:
    states = [value for state in engine.optimizer.state.values() for value in state.values()]
    kept = [*(value for value in states if isinstance(value, Tensor)), *(part.key for part in engine.slices())]
    kept += getattr(getattr(engine, "zero", None), "param_buffer_of_bit16_for_cpu_offload_groups", [])
    return {address: size for address, size in storages(kept).items() if address not in parameter_storages(engine)}


def gradient_storages(engine: Engine) -> dict[int, int]:
    """Once the last backward of a step has ended; under ZeRO 1 before they are reduced."""
    zero: Any = getattr(engine, "zero", None)
    stage = getattr(engine, "stage", 0)
    if stage == 3:
        own = [zero.grad_partitions_flat_buffer, *(tensor.grad for tensor in zero.fp32_partitioned_groups_flat)]
        return storages(own)
    if stage == 2 and zero.cpu_offload:
        return storages(tensor.grad for tensor in zero.single_partition_of_fp32_groups)
    if stage == 2:
        groups = range(len(zero.bit16_groups))
        # What follows the parameters' own gradients is padding.
        return storages(
            tensor
            for group in groups
            for tensor, _ in zip(zero.averaged_gradients[group], zero.params_in_partition[group], strict=False)
        )
    return storages(parameter.grad for parameter in engine.model.parameters())


def before(owner: Any, name: str, action: Any) -> None:
    """Have `action` called before the method."""
    method = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        action()
        return method(*arguments, **named)

    setattr(owner, name, wrapped)


def watch_gradients(engine: Any, found: dict[int, int]) -> None:
    """Note them where they stand in full: address and bytes."""

    def note() -> None:
        found.clear()
        found.update(gradient_storages(engine))

    stage = getattr(engine, "stage", 0)
    if stage == 0:
        before(engine, "step", note)
    else:
        before(engine.zero, "reduce_gradients" if stage == 1 else "step", note)


def everything() -> set[int]:
    """Addresses of all tensors that Python knows."""
    gc.collect()  # DeepSpeed leaves some in reference cycles, which Python lets go at a time of its own
    # By type: `isinstance` would ask objects that answer with a warning.
    known = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
    return set(storages(tensor for tensor in known if tensor.layout == torch.strided and tensor.device.type == "cpu"))


def batches(config: Config, accumulation: int) -> list[Batch]:
    micro, size = config.train.micro_batch_size, config.data.image_size
    labels = {
        name: torch.zeros(micro, dtype=torch.int64) if task.kind == "classification" else torch.full((micro,), 0.5)
        for name, task in config.tasks.items()
    }
    images = (torch.randint(0, 255, (micro, 3, size, size), dtype=torch.uint8) for _ in range(accumulation))
    return [Batch(pictures, labels, torch.arange(micro)) for pictures in images]


class Sent(TorchDispatchMode):
    """Counts bytes that each process of a ring sends while it is on."""

    # Of each collective the argument that is whole, and how often a ring passes it round.
    WHOLE: ClassVar = {
        "allreduce_": (0, 2),
        "allgather_": (0, 1),
        "_allgather_base_": (0, 1),
        "allgather_into_tensor_coalesced_": (0, 1),
        "reduce_scatter_": (1, 1),
        "_reduce_scatter_base_": (1, 1),
        "reduce_scatter_tensor_coalesced_": (1, 1),
    }

    def __init__(self, processes: int) -> None:
        super().__init__()
        self.bytes = 0.0
        self.share = (processes - 1) / processes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::") and name[6:] in self.WHOLE:
            place, times = self.WHOLE[name[6:]]
            whole = sum(tensor.nbytes for tensor in tree_leaves(args[place]) if isinstance(tensor, Tensor))
            self.bytes += times * self.share * whole
        return func(*args, **(kwargs or {}))


def take_steps(config: Config, topology: Topology, phase: str) -> tuple[dict[str, int], list[set[int]]]:
    """Make an engine and its steps; bytes of its states, and the addresses in use before each measured step."""
    tasks = make_tasks(config.tasks, {name: tuple(map(str, range(count))) for name, count in classes(config).items()})
    own = next(entry for entry in config.phases if entry.name == phase)
    model = build_model(config.model, config.tasks, classes(config), config.data.image_size, 0, load=False)
    model.set_trainable(own.trainable)
    model.checkpoint_activations(config.train.checkpoint_activations)
    accumulation = config.train.global_batch_size // (config.train.micro_batch_size * topology.world_size)
    groups = param_groups(model, config.train.weight_decay, peaks=peak_rates(model, own))
    engine = make_engine(topology, model, groups, config.train, config.train.micro_batch(1), accumulation)
    engine.set_lr(1e-6)
    gradients: dict[int, int] = {}
    watch_gradients(engine, gradients)
    work = batches(config, accumulation)
    counts = {task.name: config.train.global_batch_size for task in tasks}
    used = []
    for step in range(STEPS):
        measured = step >= STEPS - MEASURED
        if measured:
            # DDP's buckets are known to Python only while gradients lie in them.
            used.append(everything() | (gradients.keys() if topology.world_size > 1 else set()))
        with record_function(MARK) if measured else contextlib.nullcontext():
            train_step(engine, Objective(tasks), work, counts, 0, topology.device, lambda _: None)
    found = {"gradients": sum(gradients.values()), "parameters": sum(parameter_storages(engine).values())}
    found["optimizer"] = sum(optimizer_storages(engine).values())
    with Sent(topology.world_size) as sent:
        train_step(engine, Objective(tasks), work, counts, 0, topology.device, lambda _: None)
    found["sent"] = round(sent.bytes)
    engine.close()
    return found, used


def peak_of(profiler: Any, used: list[set[int]]) -> int:
    """Bytes at a step's fullest moment, of the measured step that shows less.

    What a thread of gloo lets go of, it does unseen. Such a block is struck off when its address is handed out again,
    or when a measured step begins and nobody has it.
    """
    waiting, begins, events = list(profiler.profiler.kineto_results.experimental_event_tree()), [], []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == MARK:
            begins.append(event.start_time_ns)
        if event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    begins.sort()
    blocks, now, peaks = Blocks(), 0, []
    for time, address, size in sorted(events):
        if len(peaks) < len(begins) and time >= begins[len(peaks)]:
            for lost in blocks.sizes.keys() - used[len(peaks)]:
                now -= blocks.give(lost)
            peaks.append(now)
        now += blocks.take(address, size) if size > 0 else -blocks.give(address)
        if peaks:
            peaks[-1] = max(peaks[-1], now)
    return min(peaks)


class Blocks:
    """Memory that is handed out, by address."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.order: list[int] = []

    def take(self, address: int, size: int) -> int:
        """Hand a block out; by how many bytes there are more, less those struck off in its place."""
        first = bisect.bisect_left(self.order, address)
        if first and self.order[first - 1] + self.sizes[self.order[first - 1]] > address:
            first -= 1
        last = bisect.bisect_left(self.order, address + size)
        struck = sum(self.sizes.pop(old) for old in self.order[first:last])
        self.order[first:last] = [address]
        self.sizes[address] = size
        return size - struck

    def give(self, address: int) -> int:
        """Take a block back; its bytes."""
        size = self.sizes.pop(address, 0)
        if size:
            del self.order[bisect.bisect_left(self.order, address)]
        return size


def rank(arguments: argparse.Namespace) -> None:
    """A process of a measurement: everything is watched from its first tensor on."""
    config = load_config(arguments.config, arguments.overrides)
    topology = start(config.train.precision, config.train.stall_timeout)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            found, used = take_steps(config, topology, arguments.phase)
        ranks = topology.control.to_all({**found, "peak": peak_of(profiler, used)})
        if topology.is_main:
            arguments.out.write_text(json.dumps(ranks))
    finally:
        leave()


def measure(arguments: argparse.Namespace, launch: str, phase: str) -> list[dict[str, int]]:
    """For each rank, bytes by kind and at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks.json"
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", f"launch/accelerate/{launch}.yaml", __file__),
            *("--config", arguments.config, "--phase", phase, "--out", str(out), *arguments.overrides),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-4000:]}")
        found: list[dict[str, int]] = json.loads(out.read_text())
    return found


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each phase and launch file: what is foretold, and what each rank has taken."""
    config = load_config(arguments.config, arguments.overrides)
    rows, planners = [], {}
    for launch in arguments.launch:
        processes = 1 if launch == "cpu" else 2
        if processes not in planners:
            planners[processes] = Planner(config, classes(config), processes, sys.maxsize, "cpu")
        planner = planners[processes]
        wanted = (launch, bool(config.train.checkpoint_activations))
        strategy = next(one for one in planner.strategies if (one.name, one.recompute) == wanted)
        for phase in arguments.phase or [config.phases[-1].name]:
            planned = []
            for index in range(processes):
                process = planner.process(phase, strategy, config.train.micro_batch_size, index)
                states, (_, peak) = process.states, process.peak
                held = {kind: getattr(states, kind) + getattr(states, f"host_{kind}") for kind in KINDS}
                sent = planner.sent(phase, strategy, config.train.micro_batch_size)
                planned.append({**held, "buckets": process.communication, "peak": peak, "sent": round(sent)})
            measured = measure(arguments, launch, phase)
            rows.append({"launch": launch, "phase": phase, "planned": planned, "measured": measured})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Rank 0's figures in MB, measured and planned, and how far the peak is off."""
    table = Table(box=None)
    for column in ("launch file", "phase", *KINDS, "sent", "peak", "planned ÷ measured"):
        table.add_column(column, justify="left" if column in ("launch file", "phase") else "right")
    for row in rows:
        have, want = row["measured"][0], row["planned"][0]
        cells = [f"{have[kind] / 1e6:,.1f} / {want[kind] / 1e6:,.1f}" for kind in (*KINDS, "sent", "peak")]
        table.add_row(row["launch"], row["phase"], *cells, f"{want['peak'] / have['peak']:.3f}")
    console = Console(width=160)
    console.print("MB of rank 0, measured / planned")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--launch", nargs="+", default=["ddp", "zero1", "zero2", "zero3"])
    parser.add_argument("--phase", nargs="+", help="the last, if it is not given")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    if arguments.out is not None:
        (arguments.phase,) = arguments.phase
        rank(arguments)
        os._exit(0)  # as train.py does: at Python's own end, threads of gloo may abort the process
    rows = compare(arguments)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
