"""Whether the config fits into the memory that is here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from hybrid_dist.config import Config
from hybrid_dist.doctor.line import Line, fail, ok, warn
from hybrid_dist.errors import UserError
from hybrid_dist.machine import available_memory


def memory_lines(config: Config) -> Iterator[Line]:
    """The config as it stands, on this machine's GPUs, times the nodes under srun; without a GPU in main memory."""
    from hybrid_dist.plan import fit

    gpus = torch.cuda.device_count()
    processes = max(gpus, 1) * (int(os.environ.get("SLURM_NNODES", "1")) if gpus else 1)
    if gpus:
        device = "cuda"
        memory = min(torch.cuda.get_device_properties(index).total_memory for index in range(gpus))
    else:
        device, memory = "cpu", available_memory()
    try:
        found = fit(config, processes, memory, device)
    except UserError as error:
        yield warn("memory", str(error), "hybrid-dist plan tells what fits on how many GPUs")
        return
    where = f"on each of {processes} GPUs" if processes > 1 else "on the GPU" if gpus else "in main memory"
    own, needed, there = config.train.micro_batch(found.micro_batch or 1), found.bytes / 1e9, memory / 1e9
    text = f"phase {found.phase} takes about {needed:.1f} of {there:.1f} GB {where}, micro batch {own}"
    if found.fits:
        yield ok("memory", f"{text}, {found.launch}")
    elif found.micro_batch:
        more = f" with launch/accelerate/{found.launch}.yaml" if processes > 1 else ""
        yield fail("memory", text, f"train.micro_batch_size={found.micro_batch}{more} would fit")
    else:
        yield fail("memory", text, "more GPUs, or larger ones; hybrid-dist plan tells what would do")
