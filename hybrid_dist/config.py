"""The typed config: defaults < YAML < `key=value`. The one place that knows a key."""

from __future__ import annotations

import difflib
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hybrid_dist.errors import UserError

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]

PARTS = ("cnn", "transformer", "fusion", "heads")
"""What a model consists of, and what `trainable` and rates can speak of."""


def _rates(value: Any) -> Any:
    """Refuse what is neither a rate nor a mapping of parts to rates; one sentence for both."""
    for part, rate in value.items() if isinstance(value, dict) else [("", value)]:
        if part and part not in PARTS:
            raise ValueError(f"there is no part {part!r}; {', '.join(PARTS)} would do")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            whose = f"the rate of {part} is {rate!r}; " if part else ""
            raise ValueError(f"{whose}expected a finite number above 0, or one by part such as {{heads: 1e-3}}")
    return value


Rates = Annotated[float | dict[str, float], BeforeValidator(_rates)]


class Section(BaseModel):
    """A mapping of the config: unknown keys and wrong types are refused, values can't change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class RunConfig(Section):
    name: FileName
    """The run's folder is `dir/name`."""
    dir: str = "runs"
    """Where runs are kept."""
    seed: int = Field(0, ge=0)
    """Everything random follows from it: order of samples, augmentation, dropout, fresh weights."""


class DataConfig(Section):
    train_csv: str
    """Annotations of the training split."""
    train_images: str
    """Folder of its pictures."""
    val_csv: str
    """Annotations of the validation split."""
    val_images: str
    """Folder of its pictures."""
    image_size: int = Field(224, ge=32)
    """Side in pixels of the square that the model sees; the whole aircraft is fitted into it."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Loader processes per rank; `auto`: the machine's cores shared among its ranks."""
    packed: Literal["auto", "always", "never"] = "auto"
    """Whether to read from a packed copy of the pictures."""
    max_bad: float = Field(0.01, ge=0, le=1)
    """Share of a split's pictures that may be missing or broken: those count as samples without labels."""
    augment: bool = True
    """Augment the training pictures, as far as each sample's labels stay true."""
    balance: str | None = None
    """A classification task whose rare classes come more often: in an epoch by the root of their number of pictures."""
    mixup: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Alpha of the Beta that mixup's shares come from; 0: none. Each mixed picture is loaded beside another one."""
    cutmix: float = Field(0.0, ge=0, allow_inf_nan=False)
    """The same for CutMix; where both are on, half of the mixed pictures each."""
    mix_prob: float = Field(0.5, ge=0, le=1)
    """Share of the training pictures that is mixed, where mixup or CutMix is on."""
    degrade: float = Field(0.0, ge=0, le=1)
    """Share of the training pictures with a clarity or block label that is blurred or covered, and labelled anew."""


class BranchConfig(Section):
    name: str
    """A timm model name, with its pretrained tag where it has several."""
    kwargs: dict[str, Any] = {}
    """More arguments of the timm model."""
    weights: str = "hub"
    """`hub`, a local .safetensors or .pth, a run's folder, or `scratch`."""


class ModelConfig(Section):
    cnn: BranchConfig | None
    """The convolutional branch."""
    transformer: BranchConfig | None
    """The transformer branch; null for a single-backbone baseline."""
    fusion: str = "concat"
    """How the branches' features become one: concat, add, attention, gated, cross_attention."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout before each head's linear layers."""
    allow_scratch: bool = False
    """Says that training a branch from random weights is meant."""

    @model_validator(mode="after")
    def _some_branch(self) -> ModelConfig:
        if self.cnn is None and self.transformer is None:
            raise ValueError("give model.cnn, model.transformer or both")
        return self


SCORE_WEIGHTS = {"type": 0.5, "airline": 0.2, "clarity": 0.15, "block": 0.15}


METRICS: dict[str, dict[str, int]] = {
    "classification": {"acc1": 1, "acc5": 1, "f1": 1, "ece": -1, "ece_calibrated": -1},
    "regression": {"mae": -1, "rmse": -1, "corr": 1},
}
"""By kind of task: what validation tells of it, `val/TASK_…`, and whether more (1) or less (-1) is better."""


class TaskConfig(Section):
    kind: Literal["classification", "regression"]
    """Classes with cross-entropy, or a score in 0–1 with smooth L1."""
    column: str
    """The CSV's column. `…name` and `…id` columns go together."""
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """The task's share in the loss."""
    score_weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The task's share in `val/score`. Default: type 0.5, airline 0.2, clarity and block 0.15, any other 0.25."""
    sensitive_to: list[Literal["sharpness", "occlusion", "colour"]] | None = None
    """What augmentation must not touch in a sample that carries this label. Default: by column, else all of it."""
    smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of a training label that is spread evenly over all classes; `val/loss` stays without it."""
    tail: Literal["none", "balanced", "logit_adjusted"] = "none"
    """How training's loss makes up for rare classes: weights by effective number, or logits shifted by frequency."""

    @model_validator(mode="after")
    def _of_classes(self) -> TaskConfig:
        if self.kind == "regression" and self.smoothing > 0:
            raise ValueError("smoothing spreads a label over classes, and regression has none; smoothing: 0 would do")
        if self.kind == "regression" and self.tail != "none":
            raise ValueError("tail makes up for rare classes, and regression has none; tail: none would do")
        return self

    def share(self, name: str) -> float:
        """The task's weight in `val/score`."""
        return self.score_weight if self.score_weight is not None else SCORE_WEIGHTS.get(name, 0.25)


class ProfileConfig(Section):
    start: int = Field(5, ge=1)
    """The first step of each phase to be profiled; a resume profiles what it makes of those steps."""
    steps: int = Field(5, ge=1)
    """So many of them."""


class TrainConfig(Section):
    global_batch_size: int = Field(64, ge=1)
    """Samples in an optimizer step, over all processes: the only batch size that the result depends on."""
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = 16
    """Samples that a process takes at a time; accumulation follows. `auto`: by the plan, less if memory runs out."""
    checkpoint_activations: list[Literal["cnn", "transformer"]] = []
    """Branches whose blocks are computed again in the backward pass instead of kept: slower, with less memory."""
    compile: bool = False
    """Compile the backbones' repeated blocks (torch.compile), which takes minutes at the start."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the forward pass; weights and optimizer stay fp32. CPUs without AVX-512 do bf16 ten times slower."""
    weight_decay: float = Field(0.05, ge=0, allow_inf_nan=False)
    """AdamW's, on matrices and convolutions alone."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's."""
    clip_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Gradients are scaled down to this global norm."""
    deterministic: bool = False
    """Use algorithms alone that give the same bits each time, also on a GPU; slower there."""
    ema: float | None = Field(None, gt=0, lt=1, allow_inf_nan=False)
    """Decay of a running mean of the weights, such as 0.999: that is what is validated and kept; null: no mean."""
    max_bad_steps: int = Field(10, ge=1)
    """So many steps in a row whose loss or gradients are no numbers, or explode: back to the last good checkpoint."""
    task_balance: Literal["fixed", "uncertainty"] = "fixed"
    """The tasks' weights in the loss: as they stand, or times what is learned from each task's uncertainty."""
    stall_timeout: float | None = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds without progress after which every rank writes its stacks and the job ends; null: never."""
    profile: ProfileConfig | None = None
    """Where the time of some steps goes, by torch.profiler, into `RUN/profile/`; null: not looked at."""

    def micro_batch(self, otherwise: int) -> int:
        """The micro batch, where it is a number."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else otherwise


class PhaseConfig(Section):
    name: FileName
    """The phase's name, as in `--phase NAME` and `phase_NAME/`."""
    trainable: list[str] = Field(min_length=1)
    """Parts (heads, fusion, cnn, transformer, all) or patterns of parameter names; the rest is frozen."""
    epochs: float | None = Field(None, gt=0, allow_inf_nan=False)
    """How long, in passes over the training split,"""
    steps: int | None = Field(None, ge=1)
    """or in optimizer steps."""
    lr: Rates
    """Peak learning rate; or one for each part that trains, such as `{heads: 1e-3, transformer: 5e-5}`."""
    layer_decay: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    """In a backbone each layer's rate is so many times that of the layer above it; null: one rate for all."""
    warmup: float = Field(0.05, ge=0, le=1)
    """Share of the phase in which the rate climbs to its peak; then it falls along a cosine."""
    patience: int | None = Field(None, ge=1)
    """The phase ends early after so many validations in a row without a better `val/score`; null: it does not."""
    start: Literal["best", "last"] = "best"
    """Which weights of the phase before this one begins with."""
    image_size: int | None = Field(None, ge=32)
    """Side in pixels of the phase's pictures, in training and validation; null: `data.image_size`."""
    carry_optimizer: bool = False
    """Begin with the optimizer's state, as of those weights, of what trained in the phase before too."""
    cache_features: int | None = Field(None, ge=1)
    """Frozen branches run over so many augmented views of a picture once; then their features are read; null: off."""

    @model_validator(mode="after")
    def _one_duration(self) -> PhaseConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self


class CheckpointConfig(Section):
    every_steps: int | None = Field(500, ge=1)
    """Optimizer steps between checkpoints, besides the one at each epoch's end; null: no others."""
    keep: int = Field(3, ge=1)
    """The newest so many stay; and, if the next phase carries its optimizer state on, the best."""


class TrackingConfig(Section):
    log_every: int = Field(10, ge=1)
    """Optimizer steps between lines in metrics.jsonl."""
    communication: bool = True
    """Profile a step now and then for perf/communication. Off: leaves the GPU's tracing to another profiler."""
    wandb: Literal["auto", "off", "offline", "online"] = "auto"
    """`auto` takes WANDB_MODE, if it is set, else `online` where somebody is logged in, else `offline`."""
    project: str | None = None
    """wandb's project. Default: WANDB_PROJECT, else hybrid-dist."""
    entity: str | None = None
    """wandb's team or user. Default: the one that is logged in."""
    report: bool = True
    """Write RUN/report.html at the end; hybrid-dist report does it at any time."""
    goals: dict[str, float] = {}
    """What the report holds the run against, by metric without `val/`, such as `{score: 0.9, clarity_mae: 0.05}`."""


class DebugConfig(Section):
    trace: bool = False
    """Write trace.jsonl: sample ids, pixel digest and loss of each optimizer step."""


def default_phases() -> list[PhaseConfig]:
    """Heads and fusion, then the transformer too, then everything."""
    return [
        PhaseConfig(name="a", trainable=["heads", "fusion"], epochs=5, lr=1e-3),
        PhaseConfig(name="b", trainable=["heads", "fusion", "transformer"], epochs=10, lr=5e-5),
        PhaseConfig(name="c", trainable=["all"], epochs=15, lr=1e-5),
    ]


class Config(Section):
    run: RunConfig
    data: DataConfig
    model: ModelConfig
    tasks: dict[Name, TaskConfig] = Field(min_length=1)
    train: TrainConfig = TrainConfig()
    phases: list[PhaseConfig] = Field(default_factory=default_phases, min_length=1)
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    debug: DebugConfig = DebugConfig()

    @model_validator(mode="after")
    def _goals_of_metrics(self) -> Config:
        known = self.metrics()
        for name in self.tracking.goals:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
                raise ValueError(f"tracking.goals.{name}: is no metric of this run; {hint}")
        return self

    def metrics(self) -> dict[str, int]:
        """What validation tells, without `val/`: more (1) or less (-1) is better."""
        each = {
            f"{name}_{key}": better for name, task in self.tasks.items() for key, better in METRICS[task.kind].items()
        }
        return {"score": 1, **each, **{f"loss_{name}": -1 for name in self.tasks}, "loss": -1}

    @model_validator(mode="after")
    def _balance_of_classes(self) -> Config:
        known = [name for name, task in self.tasks.items() if task.kind == "classification"]
        if self.data.balance is not None and self.data.balance not in known:
            would = f"{', '.join(known)} or null would do" if known else "null would do, there is none"
            raise ValueError(f"data.balance: {self.data.balance!r} is no classification task; {would}")
        return self

    @model_validator(mode="after")
    def _distinct_phases(self) -> Config:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise ValueError(f"phases need different names, got {', '.join(names)}")
        if self.phases[0].carry_optimizer:
            raise ValueError("phases.0.carry_optimizer: there is no phase before it to carry anything from")
        return self

    @model_validator(mode="after")
    def _views_in_turn(self) -> Config:
        for index, phase in enumerate(self.phases):
            if phase.cache_features is not None and self.data.balance is not None:
                raise ValueError(
                    f"phases.{index}.cache_features: with data.balance a picture may come several times in an epoch,"
                    " before its features are there; null, or data.balance: null, would do"
                )
        return self

    def size(self, phase: PhaseConfig) -> int:
        """Side in pixels of a phase's pictures."""
        return phase.image_size if phase.image_size is not None else self.data.image_size

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of pictures that the phases want, each once, in their order."""
        return tuple(dict.fromkeys(map(self.size, self.phases)))

    @property
    def final_size(self) -> int:
        """The size of the last phase's pictures, and so of those that the finished model takes."""
        return self.size(self.phases[-1])

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run.dir) / self.run.name

    def identity(self) -> dict[str, Any]:
        """The keys that a run's result follows from, flat; what may differ from start to start is left out."""
        values = self.model_dump(mode="json")
        for section in ("run", "data", "train"):
            values[section] = {key: value for key, value in values[section].items() if key not in _FREE[section]}
        return dict(_flatten({key: value for key, value in values.items() if key not in _FREE[""]}, ""))

    def alike(self) -> dict[str, Any]:
        """The keys in which all processes of a start must agree, flat: a machine may keep its data elsewhere."""
        values = self.model_dump(mode="json")
        values["data"] = {key: value for key, value in values["data"].items() if key not in _FREE["data"]}
        return dict(_flatten(values, ""))

    def to_yaml(self) -> str:
        """The resolved config, as `load_config` reads it."""
        out = io.StringIO()
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump(self.model_dump(mode="json"), out)
        return out.getvalue()


# A data set may have moved since; whether it is the same one is seen by its contents.
_FREE = {
    "": {"checkpoint", "tracking", "debug"},
    "run": {"dir"},
    "data": {"workers", "packed", "max_bad", "train_csv", "train_images", "val_csv", "val_images"},
    "train": {
        "micro_batch_size",
        "checkpoint_activations",
        "compile",
        "max_bad_steps",
        "deterministic",
        "stall_timeout",
        "profile",
    },
}


def _flatten(values: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(values, dict):
        entries: Any = values.items()
    elif isinstance(values, list):
        entries = enumerate(values)
    else:
        return [(prefix, values)]
    return [pair for key, value in entries for pair in _flatten(value, f"{prefix}.{key}" if prefix else str(key))]


def without_logins(text: str) -> str:
    """The text without what stands before an @ or after a ? in an address: it is for more eyes than the config."""
    without = re.sub(r"://[^\s\"']*@", "://", text)
    return re.sub(r"(://[^\s\"'?]*)\?[^\s\"']*", r"\1", without)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `key.path=value` in order, and check everything.

    Raises:
        UserError: the file can't be read, or a key or value is refused; names the file, the key and what would do.
    """
    return parse_config(_read_yaml(Path(path)), str(path), overrides)


def parse_config(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Apply `key.path=value` to plain values, as they stand in YAML, and check them; `source` names them in messages.

    Raises:
        UserError: a key or value is refused.
    """
    for override in overrides:
        _apply(values, override)
    try:
        # JSON mode: strict on types, yet a list in YAML may stand for a tuple.
        return Config.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise explain(error, source, Config) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {error}") from None


def explain(error: ValidationError, source: str, model: type[BaseModel]) -> UserError:
    """What pydantic found wrong with the values of a `model`, a line each; `source` names the file."""
    lines = [_explain(entry, model) for entry in _joined(error)]
    return UserError(f"{source}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0]))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(
            f"no config {path}" + (f"; in {path.parent} there is {', '.join(near)}" if near else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a config is a mapping of keys, this holds {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in place; the value is read as YAML, list entries are named by their index."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r}: expected key.path=value")
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        value = text
    node: Any = values
    *parents, last = key.split(".")
    for part in parents:
        node = _child(node, part, values, key)
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, values: dict[str, Any], key: str) -> Any:
    if node is values and part == "phases" and "phases" not in node:
        node["phases"] = [phase.model_dump(mode="json", exclude_defaults=True) for phase in default_phases()]
    place: Any = _index(node, part, key) if isinstance(node, list) else part
    found = node[place] if isinstance(node, list) else node.get(part)
    if found is None:
        found = node[place] = {}
    if not isinstance(found, dict | list):
        raise UserError(f"{key}: {part} is a single value, it has no keys below it")
    return found


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        would = f"a list of {len(node)}; 0 to {len(node) - 1} would do" if node else "a list that is empty"
        raise UserError(f"{key}: {part!r} is not an index into {would}")
    return int(part)


def _joined(error: ValidationError) -> list[dict[str, Any]]:
    """pydantic's errors. For a value that may be this or that it has one for each, at a place below the key: here it
    is one, at the key."""
    found: dict[tuple[int | str, ...], dict[str, Any]] = {}
    for entry in error.errors():
        location, kind = entry["loc"], str(entry["loc"][-1]) if entry["loc"] else ""
        place = location[:-1] if kind.startswith(("literal[", "constrained-")) else location
        if place in found:
            found[place]["msg"] += f" or {entry['msg'].removeprefix('Input should be ')}"
        else:
            found[place] = {**entry, "loc": place}
    return list(found.values())


def _explain(entry: Any, model: type[BaseModel]) -> str:
    """One line for one of pydantic's errors."""
    location = [str(part) for part in entry["loc"]]
    section, valid = _valid_keys(location, model)
    key = ".".join(location) or model.__name__.lower()
    if entry["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], valid, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        return f"{key}: unknown key; {hint or section + ' has ' + ', '.join(valid)}"
    if entry["type"] == "missing":
        return f"{key}: missing, it has no default"
    message = entry["msg"].removeprefix("Value error, ")
    shown = entry["input"]
    got = f", got {shown!r}" if isinstance(shown, str | int | float | bool) or shown is None else ""
    # What concerns the whole of it names its keys itself.
    return (f"{key}: {message[0].lower() + message[1:]}" if location else message) + got


def _valid_keys(location: Sequence[str], model: type[BaseModel]) -> tuple[str, list[str]]:
    """The section of `model` that the key at `location` stands in, and the keys that it has."""
    top = model.__name__.lower()
    for part in location[:-1]:
        found = _section_type(model, part)
        if found is None:
            continue
        model = found
    name = ".".join(location[:-1]) or f"a {top}"
    return name, list(model.model_fields)


def _section_type(model: type[BaseModel], part: str) -> type[BaseModel] | None:
    """The section below `part`, looking through lists, mappings and optionals."""
    field = model.model_fields.get(part)
    if field is None:
        return None
    candidates: list[Any] = [field.annotation]
    while candidates:
        candidate = candidates.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
        candidates.extend(getattr(candidate, "__args__", ()))
    return None


def reference() -> Iterable[tuple[str, str, str]]:
    """Every key with its default and its meaning, for the README's table."""
    yield from _reference(Config, "")


def _reference(model: type[BaseModel], prefix: str) -> Iterable[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        section = _section_type(model, name)
        if section is None:
            default = "required" if field.is_required() else json.dumps(field.default)
            yield prefix + name, default, field.description or ""
        else:
            if field.default is None:  # a section that may be left out as a whole
                yield prefix + name, "null", field.description or ""
            many = {"tasks": ".NAME", "phases": ".N"}.get(name, "")
            yield from _reference(section, f"{prefix}{name}{many}.")
