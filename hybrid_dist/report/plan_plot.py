"""A plan as a picture: what takes the memory under each launch file, and what more GPUs bring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_dist.errors import UserError
from hybrid_dist.files import whole_file
from hybrid_dist.plan.answer import Plan, Row
from hybrid_dist.plan.seconds import Machine
from hybrid_dist.plan.table import GB, shown
from hybrid_dist.report.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = ("parameters", "gradients", "optimizer", "ema", "activations", "buckets", "workspace")
GREY = "#a5a5a5"


def draw(plan: Plan, machine: Machine, path: Path) -> None:
    """Write a `.png` or `.svg`.

    Raises:
        UserError: it can't be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = len(plan.phases)
    with rc_context({"font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(3.4 * count + 4.6, 4.2), layout="constrained")
        *memory, scaling = figure.subplots(1, count + 1, width_ratios=[1.0] * count + [1.35])
        for axes, phase in zip(memory, plan.phases, strict=True):
            _memory(axes, plan, phase)
        for axes in memory[1:]:
            axes.sharey(memory[0])
        memory[0].set_ylabel(f"GB on each of {plan.processes} GPUs")
        figure.legend(*memory[0].get_legend_handles_labels(), loc="outside lower left", ncols=8, frameon=False)
        _scaling(scaling, plan, machine)
        try:
            with whole_file(path) as beside:
                figure.savefig(beside, format=path.suffix[1:], dpi=130)
        except OSError as error:
            raise UserError(f"--plot {path}: can't be written: {error.strerror}") from error


def _memory(axes: Axes, plan: Plan, phase: str) -> None:
    """Stacked bars, with what is there at once as a line on each: not all of a bar is."""
    rows: list[Row] = [row for row in shown(plan.rows) if row.phase == phase]
    names = [f"{row.launch}\n× {row.micro_batch}" + ("\nrecomputing" if row.recompute else "") for row in rows]
    bottom = [0.0] * len(rows)
    for part, colour in zip(PARTS, (*COLOURS[:6], GREY), strict=True):
        heights = [getattr(row, part) / GB for row in rows]
        axes.bar(names, heights, bottom=bottom, color=colour, label=part, width=0.7)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    peaks = [row.peak / GB for row in rows]
    axes.plot(names, peaks, "_", color="black", markersize=17, label="peak")
    axes.axhline(plan.memory / GB, color=COLOURS[4], linewidth=1, linestyle="--", label="there is")
    axes.tick_params(axis="x", rotation=90)
    axes.set_title(f"phase {phase}")
    _bare(axes)


def _scaling(axes: Axes, plan: Plan, machine: Machine) -> None:
    """Pictures a second in each phase, and what they would be if each GPU brought as much as the first."""
    found = [scale for scale in plan.scaling if scale.choice is not None]
    counts = [scale.processes for scale in found]
    for phase, colour in zip(plan.phases, COLOURS * len(plan.phases), strict=False):
        rates = [scale.images_per_s[phase] for scale in found]
        axes.plot(counts, rates, "o-", color=colour, markersize=3.5, linewidth=1.4, label=f"phase {phase}")
        if found:
            linear = [rates[0] * count / counts[0] for count in counts]
            axes.plot(counts, linear, ":", color=colour, linewidth=0.8)
    if found:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.legend(frameon=False)
    axes.set_title(f"pictures/s, estimated, on so many {machine.device.title}")
    _bare(axes)


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
