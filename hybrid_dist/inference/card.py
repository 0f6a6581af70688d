"""The model card of an export: README.md, from what model.json says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybrid_dist.config import BranchConfig
from hybrid_dist.inference.found import FoundModel
from hybrid_dist.model.backbones import pretrained_licence
from hybrid_dist.model.fusion import fusion_class
from hybrid_dist.model.heads import HEADS

CARD = "README.md"
_TEMPLATES = Path(__file__).parent / "templates"
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")


def write_card(found: FoundModel, described: Mapping[str, Any], folder: Path) -> None:
    """Write the card of the export in `folder`; `described` is its model.json."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=False,  # it is Markdown: names go through `plain`
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["plain"] = plain
    description = found.description
    architecture = description.architecture
    branches = {"cnn": architecture.cnn, "transformer": architecture.transformer}
    present = {part: branch for part, branch in branches.items() if branch is not None}
    text = environment.get_template("card.md.j2").render(
        about=described,
        branches={part: _backbone(branch) for part, branch in present.items()},
        classes={name: labels.classes for name, labels in description.class_maps.items()},
        fusion=fusion_class(architecture.fusion, len(present)).plain,
        heads={kind: HEADS[kind].plain for kind in dict.fromkeys(task.kind for task in description.tasks.values())},
        metrics=_metrics(description.metrics),
        background=", ".join(map(str, description.preprocessing.background)),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


def plain(text: object) -> str:
    """A name from somebody's data as text on one line that means nothing to Markdown or HTML."""
    shown = "".join(char if char.isprintable() else " " for char in str(text))
    return _MARKDOWN.sub(r"\\\1", " ".join(shown.split()).replace("&", "&amp;"))


def _backbone(branch: BranchConfig) -> dict[str, str]:
    """What a branch is, and where it began."""
    began = {"hub": "timm's pretrained weights", "scratch": "random weights"}
    licence = pretrained_licence(branch) if branch.weights == "hub" else None
    return {
        "name": branch.name,
        "began": began.get(branch.weights, "weights from a file"),
        "licence": licence or "",
    }


def _metrics(metrics: Mapping[str, float | None]) -> dict[str, str]:
    return {name.removeprefix("val/"): f"{value:.4f}" for name, value in metrics.items() if value is not None}
