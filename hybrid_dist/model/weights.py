"""Where a backbone's weights come from: timm's hub, a local file, a hybrid-dist run, or nowhere (`scratch`).

Two steps, so that a mistake is found before anything is built: `find_weights` names the file, `load_weights` reads it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import timm
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models import (
    PretrainedCfg,
    load_state_dict,
    model_entrypoint,
    resolve_pretrained_cfg,
    split_model_name_tag,
)
from torch import Tensor, nn

from hybrid_dist.config import BranchConfig
from hybrid_dist.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Beside what timm says of a model: the names under which classifiers stand in original and timm files.
CLASSIFIERS = ("head", "head_dist", "fc", "classifier")


@dataclass(frozen=True)
class Source:
    """A branch's weights: `file` is None for scratch."""

    kind: Literal["hub", "file", "run", "scratch"]
    file: Path | None = None


def find_weights(part: str, config: BranchConfig, allow_scratch: bool) -> Source:
    """Name the file that a branch's weights come from, without reading it. `hub` weights are downloaded into the
    cache if they aren't there and the hub answers.

    Raises:
        UserError: scratch isn't allowed, the file or folder isn't there or can't be one, or the hub's weights don't
            exist or are out of reach.
    """
    key = f"model.{part}.weights"
    if config.weights == "scratch":
        if not allow_scratch:
            raise UserError(
                f"{key}: scratch trains {config.name} from random weights; if that is meant, set "
                "model.allow_scratch: true"
            )
        return Source("scratch")
    if config.weights == "hub":
        return Source("hub", _hub_file(key, config))
    path = Path(config.weights).expanduser()
    if path.is_dir():
        return Source("run", _run_file(part, config.name, path))
    if not path.is_file():
        raise UserError(
            f"{key}: there is no file or folder {config.weights!r}; give hub, a local "
            f"{' or '.join(SUFFIXES)} file, a run's folder, or scratch"
        )
    if path.suffix not in SUFFIXES:
        raise UserError(f"{key}: {config.weights!r} isn't one of {', '.join(SUFFIXES)}")
    return Source("run" if _of_run(part, path) else "file", path)


def load_weights(part: str, config: BranchConfig, source: Source, net: nn.Module) -> None:
    """Copy the weights at `source` into `net` (a timm model without classifier), every parameter of it.

    Raises:
        UserError: the file can't be read without running code from it, or doesn't hold this backbone.
    """
    if source.file is None:
        return
    where = f"model.{part}.weights: {source.file}"
    if source.kind == "run":
        state = fit_positions(where, config, _read_run(where, part, source.file), net)
    else:
        state = _filter(where, config, _read_file(where, source.file), net)
    misfit = _misfit(state, net, refuse_unknown=source.kind != "hub")
    if misfit:
        hint = ""
        if source.kind == "hub" and config.kwargs:
            hint = (
                f". model.{part}.kwargs ({', '.join(config.kwargs)}) may change the architecture that the "
                "pretrained weights are for: leave them out, give a file that fits, or set weights: scratch with "
                "model.allow_scratch: true"
            )
        raise UserError(f"{where} doesn't hold the weights of {config.name}: {misfit}{hint}")
    net.load_state_dict(state, strict=False)


def fit_positions(where: str, config: BranchConfig, state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """A state dict that `net` may hold at another picture size, with its tables of positions resampled to this one.

    Done by the filter through which timm takes pretrained weights. For a Swin's relative positions that is
    `resize_rel_pos_bias_table`, after BEiT's fine-tuning code (Bao et al., 2021, arxiv.org/abs/2106.08254): the table's
    entries stand in a geometric grid, dense near the middle, between which it interpolates.

    Args:
        where: Where the state is from, for messages.
        state: In timm's own names; it comes back as it is where all shapes fit.

    Raises:
        UserError: the filter can't make anything of it.
    """
    own = net.state_dict()
    if all(own[name].shape == value.shape for name, value in state.items() if name in own):
        return state
    return _filter(where, config, state, net)


def resolve_cfg(config: BranchConfig) -> PretrainedCfg:
    """What timm knows about the branch's pretrained weights (normalisation, file, input size), kwargs included.

    Raises:
        UserError: the kwargs' pretrained_cfg or pretrained_cfg_overlay isn't one.
    """
    name, tag = split_model_name_tag(config.name)
    try:
        return resolve_pretrained_cfg(
            name, config.kwargs.get("pretrained_cfg") or tag, config.kwargs.get("pretrained_cfg_overlay")
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{config.name}: timm refuses its kwargs' pretrained_cfg or pretrained_cfg_overlay: {error}"
        ) from error


def _hub_file(key: str, config: BranchConfig) -> Path:
    cfg = resolve_cfg(config)
    if cfg.file:
        if not Path(cfg.file).is_file():
            raise UserError(f"{key}: pretrained_cfg_overlay names {cfg.file!r}, there is no such file")
        return Path(cfg.file)
    if not cfg.hf_hub_id:
        others = timm.list_pretrained(f"{split_model_name_tag(config.name)[0]}.*")
        what = (
            f"timm's weights are at {cfg.url}: download that file and" if cfg.url else "timm has no pretrained weights:"
        )
        raise UserError(
            f"{key}: hub doesn't have {config.name}; {what} give a local file"
            + (f", or name one of {', '.join(others)}" if others else "")
            + ", or set weights: scratch with model.allow_scratch: true"
        )
    repo, _, revision = cfg.hf_hub_id.partition("@")
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else list(HUB_FILES)
    for file in files:
        cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision or None)
        if isinstance(cached, str):
            # What is in the cache is used without asking whether the hub has it newer: the same online and offline.
            return Path(cached)
    return _download(key, repo, revision or None, files)


def _download(key: str, repo: str, revision: str | None, files: Iterable[str]) -> Path:
    try:
        # One short question first: the hub's client itself tries for half a minute and more before it gives up.
        huggingface_hub.get_session().head(hub_constants.ENDPOINT, timeout=5.0)
        for file in files:
            try:
                return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision))
            except RemoteEntryNotFoundError:
                continue
        reason = f"none of {', '.join(files)} in it"
    except LocalEntryNotFoundError as error:
        reason = str(error.__cause__ or error)
    except Exception as error:  # the client's errors have no common class, and all mean the same to the user
        reason = str(error)
    reason = (reason.strip().splitlines() or ["no answer"])[0]
    raise UserError(
        f"{key}: the pretrained weights {repo} aren't in the cache ({hub_constants.HF_HUB_CACHE}) and can't be "
        f"downloaded ({reason}). On a machine with a network: hf download {repo}, with HF_HOME on a disk that this "
        "machine sees too; or give the path of a local file as weights; or set weights: scratch with "
        "model.allow_scratch: true"
    )


def _run_file(part: str, name: str, folder: Path) -> Path:
    """The weights file of a run, after a look at which backbone it holds."""
    key = f"model.{part}.weights"
    file = folder / "model" / "model.safetensors"
    if not file.is_file():
        bests = sorted(folder.glob("phase_*/best.safetensors"), key=_age)
        if not bests:
            raise UserError(
                f"{key}: {folder} has neither model/model.safetensors nor phase_*/best.safetensors: "
                "it isn't the folder of a run that finished a phase"
            )
        file = bests[-1]
    held = _read_json(folder / "model" / "model.json").get("architecture")
    branch = held.get(part) if isinstance(held, Mapping) else None
    if isinstance(branch, Mapping) and not _same_backbone(str(branch.get("name")), name):
        raise UserError(f"{key}: the run {folder} has {branch.get('name')} as its {part}, model.{part}.name is {name}")
    if not _keys_below(f"{key}: {file}", part, file):
        raise UserError(f"{key}: the run {folder} has no {part}; its model has {', '.join(_parts(file))}")
    return file


def _age(best: Path) -> tuple[int, float]:
    """Sorts bests by the step that they were taken at; a copied folder keeps no times."""
    step = _read_json(best.with_suffix(".json")).get("step", -1)
    return step if isinstance(step, int) else -1, best.stat().st_mtime


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    return values if isinstance(values, dict) else {}


def _same_backbone(held: str, wanted: str) -> bool:
    """A tag left out fits any: `convnext_base` fits `convnext_base.fb_in1k`."""
    if "." in held and "." in wanted:
        return held == wanted
    return held.partition(".")[0] == wanted.partition(".")[0]


def _keys_below(where: str, part: str, file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return [name for name in tensors.keys() if name.startswith(f"{part}.net.")]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where} can't be read: {error}") from None


def _of_run(part: str, file: Path) -> bool:
    """Whether a file has a run's whole model; what can't be read says so when it is loaded."""
    try:
        return file.suffix == ".safetensors" and bool(_keys_below("", part, file))
    except UserError:
        return False


def _parts(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return sorted({name.partition(".")[0] for name in tensors.keys()})  # noqa: SIM118


def _read_run(where: str, part: str, file: Path) -> dict[str, Tensor]:
    names = _keys_below(where, part, file)
    with safe_open(file, framework="pt") as tensors:
        return {name.removeprefix(f"{part}.net."): tensors.get_tensor(name) for name in names}


def _read_file(where: str, file: Path) -> dict[str, Tensor]:
    """The state dict in `file`: `state_dict`, `model` and their EMA looked into, `module.` prefixes removed."""
    try:
        # weights_only refuses every pickle that could call something.
        state: dict[str, Tensor] = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # unpickling a broken file raises almost anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{where} can't be loaded as plain tensors; a pickle that would run code is refused. If you "
            "trust it, save its state dict as .safetensors where it was made "
            f"({reason[0]})"
        ) from None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
        raise UserError(
            f"{where} isn't a state dict (tensors by name, or such under state_dict or model)"
            + (f": {_few(odd)} are no tensors" if odd else ": it is empty")
        )
    return state


def _filter(where: str, config: BranchConfig, state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Rename original keys to timm's and resample position tables, as timm does for its own downloads."""
    # timm keeps its filters by this convention, one a module; what none of them fits is refused by name afterwards.
    module = sys.modules[model_entrypoint(split_model_name_tag(config.name)[0]).__module__]
    filter_fn: Callable[..., dict[str, Tensor]] | None
    filter_fn = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if filter_fn is None:
        return state
    try:
        with warnings.catch_warnings():
            # timm's interpolation indexes with a list where torch wants a tuple, and means the same.
            warnings.filterwarnings("ignore", module=r"timm\.layers\.interpolate")
            filtered: dict[str, Tensor] = filter_fn(state, net)
    except Exception as error:  # the filters assume a file of their own architecture
        raise UserError(
            f"{where} doesn't hold the weights of {config.name}: timm's filter for it fails with "
            f"{type(error).__name__}: {error}; the file has {_few(list(state))}"
        ) from error
    return filtered


def _misfit(state: Mapping[str, Tensor], net: nn.Module, refuse_unknown: bool) -> str:
    """What keeps `state` from filling `net`, in words; empty if it fits. Classifiers are beside the point."""
    expected = net.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    cfg = getattr(net, "pretrained_cfg", {})
    named = cfg.get("classifier") or ()
    classifiers = tuple(f"{name}." for name in (*CLASSIFIERS, *((named,) if isinstance(named, str) else named)))
    unknown = [name for name in state if name not in expected and not name.startswith(classifiers)]
    words = []
    if missing:
        words.append(f"{len(missing)} missing ({_few(missing)})")
    if wrong:
        words.append(f"{len(wrong)} of another shape ({_few(wrong)})")
    if unknown and refuse_unknown:
        words.append(f"{len(unknown)} that the backbone doesn't have ({_few(unknown)})")
    return ", ".join(words)


def _few(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
