"""Plots as SVG for a page: transparent, in the page's own ink, without a request or an id of another plot."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3f87c9", "#e0862d", "#3f9d5f", "#b566c4", "#cc5252", "#8b8a3a")
"""Of splits and curves, in their order: readable on white and on black."""

BARS = 40
"""Classes in a plot, the largest first."""

_INK = "#010203"  # stands for the page's colour of text until the SVG is made


def histogram(name: str, values: Mapping[str, np.ndarray]) -> str:
    """How numbers are spread in each split, in percent of it; empty where there are none.

    Args:
        name: of the plot, unlike any other's on the page.
        values: per split, (n,).
    """
    filled = {split: numbers for split, numbers in values.items() if len(numbers)}
    if not filled:
        return ""
    # The thousandth at either end is told by name; it is not to squeeze all others into one bar.
    everything = np.concatenate(list(filled.values()))
    low, high = np.quantile(everything, [0.001, 0.999])
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 31)
    shares = {split: np.histogram(np.clip(n, low, high), edges)[0] / len(n) for split, n in filled.items()}
    return _steps(name, shares, edges)


def scores(name: str, counts: Mapping[str, Sequence[int]]) -> str:
    """How a task's scores in 0–1 are spread in each split, from counts in bins of equal width."""
    shares = {split: np.array(values) / max(sum(values), 1) for split, values in counts.items()}
    return _steps(f"task {name}", shares, np.linspace(0, 1, len(next(iter(counts.values()))) + 1))


def class_shares(name: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """Each class's share of each split as bars, the largest of a task's classes first."""
    classes = _largest(counts)
    if not classes:
        return ""
    height = 0.5 + 0.24 * len(classes)
    with _figure(f"task {name}", height) as (axes, made):
        place = np.arange(len(classes))
        for offset, (colour, (split, values)) in enumerate(zip(COLOURS, counts.items(), strict=False)):
            shares = [100 * values.get(label, 0) / max(sum(values.values()), 1) for label in classes]
            axes.barh(place + 0.38 * offset, shares, 0.38, color=colour, label=split)
        shown = [label if len(label) <= 28 else label[:27] + "…" for label in classes]
        axes.set_yticks(place + 0.19 * (len(counts) - 1), shown)
        for text in axes.get_yticklabels():
            text.set_parse_math(False)  # a class may be called «$x»
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.xaxis.set_major_formatter("{x:g} %")
    return made[0]


def curves(
    name: str,
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    begins: Mapping[str, int],
    resumed: Sequence[int],
    log: bool = False,
) -> str:
    """Values over a run's steps; empty where there are none.

    Args:
        series: steps and values, (n,) each, by what they are called.
        begins: each phase's first step, which is marked with its name.
        resumed: steps at which the run was gone on with, marked by triangles.
        log: a logarithmic scale.
    """
    if not series:
        return ""
    with _figure(name, 2.4) as (axes, made):
        for n, (label, (steps, values)) in enumerate(series.items()):
            colour, style = COLOURS[n % len(COLOURS)], ("-", "--", ":", "-.")[n // len(COLOURS) % 4]
            dots = "o" if len(steps) < 40 else ""
            axes.plot(steps, values, style, color=colour, linewidth=1.4, label=label, marker=dots, markersize=3)
        if log:
            axes.set_yscale("log")
        across = axes.get_xaxis_transform()
        for phase, step in begins.items():
            axes.axvline(step, color=_INK, linewidth=0.8, linestyle=":", alpha=0.6)
            text = axes.text(step, 1.0, f" {phase}", transform=across, color=_INK, alpha=0.75, va="bottom")
            text.set_parse_math(False)
        if resumed:
            axes.plot(resumed, [0.0] * len(resumed), "^", transform=across, color=_INK, markersize=6, label="resumed")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return made[0]


def scatter(name: str, labels: np.ndarray, predictions: np.ndarray) -> str:
    """Predictions of scores by their labels, (n,) each, in 0–1; the line is where they are the same."""
    with _figure(name, 4.2) as (axes, made):
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", alpha=0.7)
        axes.scatter(labels, predictions, s=9, color=COLOURS[0], alpha=0.45, linewidths=0)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("label", color=_INK)
        axes.set_ylabel("prediction", color=_INK)
    return made[0]


def confusion(name: str, classes: Sequence[str], counts: np.ndarray) -> str:
    """Which class (rows) is taken for which (columns): counts (K, K), shaded by their share of the row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(len(classes), dtype=bool)
    shades = np.zeros((*shares.shape, 4))
    for mask, colour in ((right, COLOURS[0]), (~right, COLOURS[4])):
        shades[mask] = _rgba(colour)
    shades[..., 3] = shares**0.5  # a mistake of one in fifty is to be seen
    with _figure(name, max(1.9 + 0.16 * len(classes), 3.4)) as (axes, made):
        axes.imshow(shades, interpolation="nearest")
        shown = [label if len(label) <= 22 else label[:21] + "…" for label in classes]
        axes.set_xticks(np.arange(len(classes)), shown, rotation=90)
        axes.set_yticks(np.arange(len(classes)), shown)
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_parse_math(False)
            text.set_fontsize(9 if len(classes) <= 20 else 6)
        axes.set_xlabel("taken for", color=_INK)
        axes.set_ylabel("label", color=_INK)
    return made[0]


def reliability(name: str, sure: Sequence[float], right: Sequence[float], counts: Sequence[int]) -> str:
    """How often answers are right by how sure they were: means over bins, and how many answers fell into each."""
    with _figure(name, 3.2) as (axes, made):
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", alpha=0.7)
        sizes = 14 + 240 * np.array(counts) / max(sum(counts), 1)
        axes.plot(sure, right, color=COLOURS[0], linewidth=1.2)
        axes.scatter(sure, right, s=sizes, color=COLOURS[0], alpha=0.8, linewidths=0)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("probability that was told", color=_INK)
        axes.set_ylabel("share that is right", color=_INK)
    return made[0]


def _rgba(colour: str) -> tuple[float, float, float, float]:
    from matplotlib.colors import to_rgba

    return to_rgba(colour)


def left_out(counts: Mapping[str, Mapping[str, int]]) -> str:
    """What a caption says where there are more classes than bars."""
    number = len({label for values in counts.values() for label in values})
    return f", the {BARS} largest of {number:,}" if number > BARS else ""


def _largest(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    total: dict[str, int] = {}
    for values in counts.values():
        for label, number in values.items():
            total[label] = total.get(label, 0) + number
    return sorted(total, key=lambda label: -total[label])[:BARS]


def _steps(name: str, shares: Mapping[str, np.ndarray], edges: np.ndarray) -> str:
    with _figure(name, 2.1) as (axes, made):
        for colour, (split, values) in zip(COLOURS, shares.items(), strict=False):
            axes.stairs(100 * values, edges, color=colour, fill=True, alpha=0.28)
            axes.stairs(100 * values, edges, color=colour, linewidth=1.4, label=split)
        axes.yaxis.set_major_formatter("{x:g} %")
        axes.set_ylim(bottom=0)
    return made[0]


@contextmanager
def _figure(name: str, height: float) -> Iterator[tuple[Axes, list[str]]]:
    """Axes to draw on; the second list holds the SVG afterwards."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    made: list[str] = []
    # Text stays text; ids follow from the plot's name, so that two plots on a page don't share one.
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "font.family": "sans-serif"}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of glyphs that matplotlib's own font lacks: the browser has them
        figure = Figure(figsize=(5.4, height), layout="constrained")
        axes = figure.add_subplot()
        yield axes, made
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(_INK)
        axes.tick_params(colors=_INK, which="both")
        # Beside the axes: within, it would lie on bars.
        figure.legend(loc="outside upper right", ncols=2, frameon=False, labelcolor=_INK)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
        made.append(_inline(out.getvalue()))


def _inline(svg: str) -> str:
    """An SVG file as an element: without prologue, comments and fixed size, in the page's ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # An id may stand on a page once; most of matplotlib's are for nobody.
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    return svg.replace(_INK, "currentColor")
