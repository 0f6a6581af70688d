"""What fits into the GPUs' memory, how long it takes, and what to type."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_dist.errors import UserError

if TYPE_CHECKING:
    from hybrid_dist.config import Config
    from hybrid_dist.plan.seconds import Machine
    from hybrid_dist.plan.split import Known

USUAL_WORKERS = 8
"""Loader processes for each GPU where `data.workers` is auto, which only the machine itself can tell."""


def plan(arguments: argparse.Namespace) -> int:
    """Tell, without a GPU, under which launch file and with which micro batch each phase fits into the GPUs' memory,
    and about how long it takes. Exits with 3 where nothing fits."""
    from rich.console import Console

    from hybrid_dist.config import load_config
    from hybrid_dist.plan import Planner
    from hybrid_dist.plan.split import look
    from hybrid_dist.plan.table import print_plan, to_json

    config = load_config(arguments.config, arguments.overrides)
    _check(arguments)
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    with Console(stderr=True).status("") as status:
        known = look(config)
        machine, notes = _machine(arguments, config, known)
        memory = round((arguments.gpu_memory or machine.device.memory) * 1e9)
        pictures = arguments.pictures if arguments.pictures is not None else known.pictures
        planner = Planner(config, known.classes, arguments.gpus, memory, machine.device.kind, machine, pictures)
        found = planner.plan(lambda what: status.update(f"planning {what}"))
    if known.table is None:
        counts = ", ".join(f"{count} for {task}" for task, count in known.classes.items())
        notes.append(f"the training split can't be read here: labels are taken to be {counts}")
    if arguments.plot is not None:
        from hybrid_dist.report.plan_plot import draw

        draw(found, machine, arguments.plot)
    if arguments.json:
        print(json.dumps(to_json(found, machine, known.classes, notes), indent=1))
    else:
        print_plan(found, machine, arguments.config, arguments.overrides, notes)
    return 3 if found.run is None else 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus}: 1 or more would do")
    if arguments.gpu_memory is None and arguments.gpu is None:
        raise UserError("--gpu-memory GB or --gpu NAME, or both, would tell how large the GPUs are")
    if arguments.gpu_memory is not None and not 0 < arguments.gpu_memory < float("inf"):
        raise UserError(f"--gpu-memory {arguments.gpu_memory:g}: in GB of 10⁹ bytes; 24 or 80, say")
    if arguments.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node {arguments.gpus_per_node}: 1 or more would do")
    gpus, each = arguments.gpus, arguments.gpus_per_node
    if gpus > each and gpus % each:
        fit = f"--gpus {gpus // each * each} or {(gpus // each + 1) * each}"
        raise UserError(
            f"--gpus {gpus}: that is no whole number of nodes of {each}; {fit}, or another --gpus-per-node would do"
        )
    for option, value in (("--network", arguments.network), ("--loader-rate", arguments.loader_rate)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{option} {value:g}: more than 0 would do")
    if arguments.pictures is not None and arguments.pictures < 1:
        raise UserError(f"--pictures {arguments.pictures}: 1 or more would do")


def _check_plot(path: Path) -> None:
    from hybrid_dist.report.page import check_writable

    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: FILE.png or FILE.svg would do")
    check_writable(path, "--plot")


def _machine(arguments: argparse.Namespace, config: Config, known: Known) -> tuple[Machine, list[str]]:
    """What times are told for, and what of it is taken for granted."""
    from hybrid_dist.plan.devices import NETWORK, named, usual
    from hybrid_dist.plan.seconds import ASSUMED, Machine

    notes = []
    if arguments.gpu is not None:
        device = named(arguments.gpu)
    else:
        device = usual(arguments.gpu_memory, config.train.precision)
        notes.append(f"times are for {device.title}, which has about that memory; --gpu names another")
    notes.append(ASSUMED)
    network = NETWORK if arguments.network is None else arguments.network
    if arguments.network is None:
        notes.append(f"between nodes of {arguments.gpus_per_node} GPUs {NETWORK:g} Gbit/s; --network says otherwise")
    rate, note = _loader(arguments.loader_rate, config, known)
    return Machine(device, arguments.gpus_per_node, network, rate), [*notes, note]


def _loader(given: float | None, config: Config, known: Known) -> tuple[float | None, str]:
    """Pictures a second for each GPU, by what is given, or measured, or not known."""
    from hybrid_dist.bench.data import sampled_rate

    auto = config.data.workers == "auto"
    workers = USUAL_WORKERS if auto else max(int(config.data.workers), 1)
    each = f"{workers} loader processes for each GPU" + (", as data.workers is auto" if auto else "")
    if given is not None:
        return given * workers, f"{each}"
    rate = None if known.table is None else sampled_rate(config, known.table)
    if rate is None:
        return None, "the loader is not looked at, for there is no picture to measure it on; --loader-rate would tell"
    return rate * workers, f"{each}, of {rate:.0f} pictures/s, measured here on a sample of the data"


def add(commands: Any) -> None:
    """The subcommand's command line."""
    command = commands.add_parser("plan", help="tell what fits, and how long it takes", description=plan.__doc__)
    command.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/base.yaml")
    command.add_argument("--gpus", type=int, required=True, metavar="N", help="over all nodes")
    command.add_argument("--gpu-memory", type=float, metavar="GB", help="of each; 1 GB is 10⁹ bytes")
    command.add_argument("--gpu", metavar="NAME", help="what times are for, such as a100-80, h100, rtx4090, cpu-core")
    command.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="as many have fast links (8)")
    command.add_argument("--network", type=float, metavar="GBIT", help="Gbit/s out of each node (100)")
    command.add_argument(
        "--loader-rate", type=float, metavar="N", help="pictures/s of a loader process, as bench data tells it"
    )
    command.add_argument("--pictures", type=int, metavar="N", help="in the training split, where it is not here")
    command.add_argument("--json", action="store_true", help="plain values, in bytes and seconds, on standard output")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and scaling; .png or .svg")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    command.set_defaults(run=plan)
