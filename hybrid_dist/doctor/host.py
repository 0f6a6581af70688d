"""This machine: versions, compiler, GPUs, shared memory, open files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement

from hybrid_dist.config import Config
from hybrid_dist.data.loader import resolve_workers
from hybrid_dist.doctor.line import Line, fail, ok, warn
from hybrid_dist.machine import has_bf16

SHM = Path("/dev/shm")
AHEAD = 3
"""Batches that a loader process has lying there at a time: two that wait, one that is being made."""
STEPS = 3
"""Steps whose batches a training process holds: the one under way, the next, and what waits to follow."""
FEW_FILES = 1024
"""Open files: sockets to each rank, loader processes' pipes, the parts of a packed copy."""


def host_lines(config: Config | None, processes: int) -> Iterator[Line]:
    """What can be seen without starting anything; `processes` are those that will run on this machine."""
    yield versions()
    yield compiler()
    yield from gpus(config)
    if config is not None:
        yield shared_memory(config, processes)
    yield open_files()


def versions() -> Line:
    """Whether what is installed is what this version was made for."""
    wrong, found = [], []
    for text in importlib.metadata.requires("hybrid-dist") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        if requirement.name in ("torch", "timm", "accelerate", "deepspeed"):
            found.append(f"{requirement.name} {version}")
    if wrong:
        return fail("versions", "; ".join(wrong), "pip install -c constraints.txt -e . installs what fits together")
    return ok("versions", f"Python {platform.python_version()}, {', '.join(found)}")


def compiler() -> Line:
    """DeepSpeed compiles an optimizer and its collectives at first use."""
    cxx = os.environ.get("CXX", "c++")
    if shutil.which(cxx) is None and shutil.which("g++") is None:
        return warn("compiler", f"there is no {cxx}", "ZeRO needs a C++ compiler, such as g++; DDP does not")
    return ok("compiler", shutil.which(cxx) or shutil.which("g++") or cxx)


def gpus(config: Config | None) -> Iterator[Line]:
    """Number, kind, memory, what they can do, and whether they reach each other."""
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") is not None:
            built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            yield fail(
                "GPUs", f"nvidia-smi is there, but torch finds none; {built}", "install a driver and a torch that fit"
            )
        else:
            yield ok("GPUs", "none: training runs on the CPU, over gloo")
        if config is not None and config.train.precision == "bf16" and not has_bf16(torch.device("cpu")):
            yield warn("precision", "this CPU does bf16 in software, ten times slower", "train.precision=fp32")
        return
    count = torch.cuda.device_count()
    facts = [torch.cuda.get_device_properties(index) for index in range(count)]
    names = sorted({fact.name for fact in facts})
    least = min(fact.total_memory for fact in facts) / 1e9
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield ok("GPUs", f"{count} × {', '.join(names)}, {least:.0f} GB; CUDA {torch.version.cuda}, NCCL {nccl}")
    if len(names) > 1:
        yield warn("GPUs", "they differ", "all ranks wait for the slowest in each step")
    if config is not None and config.train.precision == "bf16" and not has_bf16(torch.device("cuda")):
        yield fail("precision", f"{names[0]} can't do bf16", "train.precision=fp16, under DDP, or fp32")
    apart = [
        f"{one}–{other}"
        for one in range(count)
        for other in range(one + 1, count)
        if not torch.cuda.can_device_access_peer(one, other)
    ]
    if apart:
        shown = ", ".join(apart[:4])
        yield warn("peer access", f"none between {shown}", "collectives go through host memory; slower, and right")


def shared_memory(config: Config, processes: int) -> Line:
    """Batches wait in /dev/shm, which containers keep small."""
    workers = resolve_workers(config.data.workers, processes)
    share = config.train.global_batch_size // processes or 1
    micro = config.train.micro_batch(share)
    held = workers * AHEAD * micro + STEPS * share + micro if workers else 0
    needed = processes * held * 3 * max(config.sizes) ** 2
    if not SHM.is_dir():
        return ok("shared memory", "no /dev/shm here")
    free = shutil.disk_usage(SHM).free
    text = f"{free / 1e9:.2f} GB free in {SHM}, {needed / 1e9:.2f} GB are needed for {processes} × {workers} loaders"
    if free < needed:
        return fail("shared memory", text, "docker run --shm-size=8g, or a smaller data.workers")
    return ok("shared memory", text)


def open_files() -> Line:
    """The limit that a process may raise by itself is the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return warn("open files", f"at most {soft}, and up to {hard} if asked for", "ulimit -n 4096 before the start")
    return ok("open files", f"up to {soft}")
