"""A model for others: a folder with its weights or its graph, model.json and a card. Nothing of this machine is in it.

Another format is one function by `@register`, and its lines in the card's template.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_dist.config import BranchConfig
from hybrid_dist.errors import UserError
from hybrid_dist.files import new_folder, sync
from hybrid_dist.inference.card import write_card
from hybrid_dist.inference.found import MODEL_JSON, WEIGHTS, FoundModel
from hybrid_dist.inference.opened import OpenedModel, open_model
from hybrid_dist.model.backbones import sized_kwargs

TOLERANCE = 1e-4
"""The largest difference between a probability or score of the exported graph and of the model."""

_PROTOBUF_LIMIT = 1_900_000_000
"""Bytes; a little under the two gigabytes that one message can have."""
_ELSEWHERE = {"pretrained_cfg", "pretrained_cfg_overlay"}
"""Kwargs that say where weights come from; what else they say stands in `preprocessing`."""


@dataclass(frozen=True)
class Written:
    """A file of an export."""

    name: str
    bytes: int


Facts = dict[str, Any]
Format = Callable[[FoundModel, OpenedModel, Path], Facts]
FORMATS: dict[str, Format] = {}


def register(name: str) -> Callable[[Format], Format]:
    """Make a function available as `--format NAME`: it writes into a folder, and returns what model.json says of it."""

    def add(function: Format) -> Format:
        FORMATS[name] = function
        return function

    return add


def export(found: FoundModel, out: Path, form: str) -> list[Written]:
    """Write the model into the new folder `out`, whole or not at all.

    Args:
        form: One of `FORMATS`.

    Raises:
        UserError: `out` exists or can't be written, a library is missing, or what was made says something else than
            the model.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: {', '.join(FORMATS)} would do")
    with new_folder(out) as folder:
        opened = open_model(found, "cpu", "fp32")
        facts = FORMATS[form](found, opened, folder)
        described = _describe(found, form, facts)
        text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
        (folder / MODEL_JSON).write_text(text, encoding="utf-8")
        write_card(found, described, folder)
        files = sorted(folder.iterdir())
        for file in files:
            sync(file)
        return [Written(file.name, file.stat().st_size) for file in files]


def _describe(found: FoundModel, form: str, facts: Facts) -> dict[str, Any]:
    """model.json of an export: as it was, without what is this machine's alone."""
    values = found.description.model_dump(mode="json")
    architecture = found.description.architecture
    for part in ("cnn", "transformer"):
        branch: BranchConfig | None = getattr(architecture, part)
        if branch is not None:
            kwargs = sized_kwargs(part, branch, architecture.image_size)
            kept = {name: value for name, value in kwargs.items() if name not in _ELSEWHERE}
            values["architecture"][part] = {"name": branch.name, "kwargs": kept}
    del values["architecture"]["allow_scratch"]
    if facts.get("file") != WEIGHTS:
        del values["sha256"]
    return {**values, "export": {"format": form, **facts}}


@register("safetensors")
def _safetensors(found: FoundModel, opened: OpenedModel, folder: Path) -> Facts:
    shutil.copyfile(found.weights, folder / WEIGHTS)
    return {"file": WEIGHTS}


@register("onnx")
def _onnx(found: FoundModel, opened: OpenedModel, folder: Path) -> Facts:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter imports it, and says less)
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: pip install 'hybrid-dist[export]'") from None
    deployed, file = Deployed(opened).eval(), folder / "model.onnx"
    with _quiet():
        program = torch.onnx.export(
            deployed, (_pictures(opened, 2),), dynamo=True, verbose=False, input_names=["images"],
            output_names=[task.name for task in opened.tasks], dynamic_shapes=_DYNAMIC,
        )  # fmt: skip
    assert program is not None
    for node in program.model.graph.all_nodes():  # each tells the files and lines that it comes from
        node.metadata_props.clear()
        node.doc_string = None
    size = sum(value.nbytes for value in opened.model.state_dict().values())
    program.save(file, external_data=size > _PROTOBUF_LIMIT)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    run = lambda images: map(torch.from_numpy, session.run(None, {"images": images.numpy()}))  # noqa: E731
    return {"file": file.name, **_signature(opened), "largest_difference": _compare(opened, deployed, run)}


@register("torch")
def _torch(found: FoundModel, opened: OpenedModel, folder: Path) -> Facts:
    deployed, file = Deployed(opened).eval(), folder / "model.pt2"
    with _quiet():
        program = torch.export.export(deployed, (_pictures(opened, 2),), dynamic_shapes=_DYNAMIC)
        for node in program.graph.nodes:  # each tells the files and lines that it comes from
            node.meta.pop("stack_trace", None)
        torch.export.save(program, file)
        difference = _compare(opened, deployed, program.module())
    return {"file": file.name, **_signature(opened), "largest_difference": difference}


class Deployed(nn.Module):
    """The model as it is exported: what it predicts, a tensor for each task in the config's order."""

    def __init__(self, opened: OpenedModel):
        super().__init__()
        self.model, self.tasks = opened.model, opened.tasks
        self.temperature = dict(opened.description.temperature)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 (B, 3, S, S), RGB → probabilities (B, K) or scores (B,), fp32."""
        outputs = self.model(images)
        return tuple(
            task.predict(outputs[task.name] / self.temperature.get(task.name, 1.0)) for task in self.tasks
        )  # fmt: skip


_DYNAMIC = {"images": {0: torch.export.Dim("batch", min=1, max=65_535)}}


def _signature(opened: OpenedModel) -> Facts:
    """What goes in and comes out, for whoever calls the graph."""
    size, maps = opened.image_size, opened.classes
    outputs: Facts = {}
    for task in opened.tasks:
        classes = maps.get(task.name)
        kind = ("score", ["batch"]) if classes is None else ("probabilities", ["batch", len(classes)])
        outputs[task.name] = dict(zip(("is", "shape"), kind, strict=True))
    shape = ["batch", 3, size, size]
    return {"input": {"name": "images", "dtype": "uint8", "shape": shape, "channels": "RGB"}, "outputs": outputs}


def _pictures(opened: OpenedModel, count: int) -> Tensor:
    """Pictures of nothing, the same every time: uint8 (count, 3, S, S)."""
    size, draw = opened.image_size, torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=draw)


@torch.no_grad()
def _compare(opened: OpenedModel, deployed: Deployed, run: Callable[[Tensor], Any]) -> float:
    """The largest difference of any output, for batches of other sizes than the graph was made with.

    Raises:
        UserError: it is more than `TOLERANCE`.
    """
    largest = 0.0
    for count in (1, 3):
        images = _pictures(opened, count)
        for ours, theirs in zip(deployed(images), run(images), strict=True):
            if ours.shape != theirs.shape:
                raise UserError(f"the exported graph gives {tuple(theirs.shape)}, the model {tuple(ours.shape)}")
            largest = max(largest, float((ours - theirs).abs().max()))
    if not largest <= TOLERANCE:
        raise UserError(f"the exported graph's outputs are up to {largest:.2g} off the model's, {TOLERANCE:g} may be")
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of their own inner matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
