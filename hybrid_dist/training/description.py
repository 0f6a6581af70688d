"""model.json: all that it takes to use a model's weights. Written by training, and checked when it comes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hybrid_dist.config import Config, ModelConfig, Name, Section, TaskConfig, explain
from hybrid_dist.data.annotations import Table
from hybrid_dist.data.labels import ClassMap
from hybrid_dist.data.pictures import BACKGROUND
from hybrid_dist.errors import UserError
from hybrid_dist.model.backbones import normalisation

FORMAT = "hybrid-dist/1"
DESCRIPTION = "description.json"
"""In a run's folder, from its start: model.json without what only the best can tell."""

FIT = "the whole picture, its aspect kept, in the middle of a square of the background's colour"


class Architecture(ModelConfig):
    """`model` of the config, and the size that it was built for."""

    image_size: int = Field(ge=32)
    """Side in pixels of the square that the model sees."""


Three = tuple[float, float, float]


class Normalisation(Section):
    """What a branch makes of pixels p in 0–1: (p − mean) / std, by channel."""

    mean: Three
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class Preprocessing(Section):
    """From a picture to the model's input, and what the model itself does first."""

    fit: str
    """How the picture comes into the square, in words."""
    background: tuple[int, int, int]
    """The square's colour, RGB, where there is no picture."""
    normalise: dict[Literal["cnn", "transformer"], Normalisation]
    """By branch."""

    @field_validator("background")
    @classmethod
    def _known(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        if value != BACKGROUND:
            raise ValueError(f"this version puts pictures on {BACKGROUND}")
        return value


class Split(Section):
    """What a split held when the model was trained."""

    pictures: int
    labels: dict[str, int]
    """Labelled pictures by task."""


class Description(BaseModel):
    """A model.json. Keys that this version does not know are left aside: they can't change what the others say."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    format: Literal["hybrid-dist/1"]
    architecture: Architecture
    tasks: dict[Name, TaskConfig] = Field(min_length=1)
    labels: dict[Name, dict[str, Any]] = {}
    """By classification task, as in `ClassMap.to_json`."""
    preprocessing: Preprocessing
    precision: Literal["fp32", "bf16", "fp16"]
    """In which it was validated: the same gives the same numbers."""
    data: dict[str, Split] = {}
    temperature: dict[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """By classification task: logits are divided by it before they become probabilities."""
    phase: str | None = None
    step: int | None = None
    metrics: dict[str, float | None] = {}
    sha256: str | None = None
    """Of the weights' file."""

    @model_validator(mode="after")
    def _consistent(self) -> Description:
        classified = {name for name, task in self.tasks.items() if task.kind == "classification"}
        if missing := sorted(classified - set(self.class_maps)):
            raise ValueError(f"labels: no classes for {', '.join(missing)}")
        if strange := sorted(set(self.temperature) - classified):
            raise ValueError(f"temperature: {', '.join(strange)} is no classification task")
        both = {"cnn": self.architecture.cnn, "transformer": self.architecture.transformer}
        for part in (part for part, branch in both.items() if branch is not None):
            if part not in self.preprocessing.normalise:
                raise ValueError(f"preprocessing.normalise: {part} is missing")
        return self

    @property
    def class_maps(self) -> dict[str, ClassMap]:
        """By classification task.

        Raises:
            UserError: one is not as it must be; not for a description that has been read.
        """
        return {name: ClassMap.from_json(values, f"labels.{name}") for name, values in self.labels.items()}


def describe_model(config: Config, class_maps: Mapping[str, ClassMap], tables: Mapping[str, Table]) -> dict[str, Any]:
    """model.json as far as it is known before training: architecture, tasks, label names, preprocessing, data.

    Args:
        tables: The splits by their names.
    """
    values = config.model_dump(mode="json")
    branches = {"cnn": config.model.cnn, "transformer": config.model.transformer}
    return {
        "format": FORMAT,
        "architecture": {**values["model"], "image_size": config.final_size},
        "tasks": values["tasks"],
        "labels": {name: found.to_json() for name, found in class_maps.items()},
        "preprocessing": {
            "fit": FIT,
            "background": list(BACKGROUND),
            "normalise": {part: normalisation(branch) for part, branch in branches.items() if branch is not None},
        },
        "precision": config.train.precision,
        "data": {
            split: {"pictures": len(table), "labels": table.valid_counts()} for split, table in tables.items()
        },
    }  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON.

    Raises:
        UserError: it can't be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected an object with format, architecture, tasks, …")
    return values


def parse_description(values: dict[str, Any], source: str) -> Description:
    """Check the values of a model.json; `source` names it in messages.

    Raises:
        UserError: something in it is missing or not as it must be, or it is of another format.
    """
    found = values.get("format")
    if found != FORMAT:
        raise UserError(f"{source}: its format is {found!r}; this version reads {FORMAT!r}")
    try:
        # JSON mode: strict on types, yet a list may stand for a tuple.
        return Description.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise explain(error, source, Description) from None
