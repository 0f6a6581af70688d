"""The model: one or two backbones side by side, their fusion, a head for each task."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from hybrid_dist.config import PARTS, BranchConfig, ModelConfig, TaskConfig
from hybrid_dist.errors import UserError
from hybrid_dist.model.backbones import Backbone, Features, check_name, probe
from hybrid_dist.model.fusion import Fusion, build_fusion, find_fusion
from hybrid_dist.model.heads import BALANCE, HEADS, Balance, Head
from hybrid_dist.model.noise import Noise
from hybrid_dist.model.weights import find_weights, fit_positions, load_weights

# A module's attribute can't be called `type` (nn.Module has a method of that name), a task can.
HEAD_PREFIX = "task_"
BALANCE_HEAD = "balance"
BALANCE_PREFIX = f"heads.{BALANCE_HEAD}."
"""Of parameters that only training wants."""


class Hybrid(nn.Module):
    """uint8 pictures in, an answer for each task out. Every parameter's name begins with one of `PARTS`.

    Attributes:
        cnn, transformer: the branches; one may be None.
        fusion: of the branches' features.
        heads: `task_NAME` → head; and `balance`, where training learns the tasks' weights.
        noise: what dropout and stochastic depth draw from.
        remembers: whether `remembered` gets what the frozen branches give; through any wrapper of the model, whose
            outputs stay what they are.
        remembered: for each forward since it was last emptied, by branch.
    """

    cnn: Backbone | None
    transformer: Backbone | None

    def __init__(
        self,
        cnn: Backbone | None,
        transformer: Backbone | None,
        fusion: Fusion,
        heads: Mapping[str, Head],
        balance: Balance | None = None,
    ) -> None:
        """Put the parts together; `heads` by the name of their task."""
        super().__init__()
        self.cnn = cnn
        self.transformer = transformer
        self.fusion = fusion
        self.heads = nn.ModuleDict({HEAD_PREFIX + task: head for task, head in heads.items()})
        if balance is not None:
            self.heads[BALANCE_HEAD] = balance
        self.noise = Noise()
        self.noise.attach(self)
        self.remembers = False
        self.remembered: list[dict[str, Features]] = []

    def forward(
        self, images: Tensor, features: Mapping[str, Features] | None = None, in_step: bool = False
    ) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W), RGB, any memory format → task → logits (B, K) or scores (B,), fp32.

        In training `BALANCE` → (tasks,) comes with them, if the tasks' weights are learned.

        Args:
            features: By branch, what a frozen one has given for these pictures before. It does not run, and where
                none runs, `images` may be (B, 3, 0, 0).
            in_step: Other ranks run those branches now: here they run too, on a blank picture (`Backbone.idle`).
        """
        outputs = self.answer(self._fuse(images, features or {}, in_step)[1])
        if self.training and BALANCE_HEAD in self.heads:
            outputs[BALANCE] = self.heads[BALANCE_HEAD]()
        return outputs

    def answer(self, fused: Tensor) -> dict[str, Tensor]:
        """(B, out_features), as `get_features` gives it → task → logits (B, K) or scores (B,), fp32."""
        heads = {name: head for name, head in self.heads.items() if name != BALANCE_HEAD}
        return {name.removeprefix(HEAD_PREFIX): head(fused) for name, head in heads.items()}

    def get_features(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) → `cnn` and `transformer` (B, C), those there are, and `fused` (B, out_features)."""
        branches, fused = self._fuse(images, {})
        return {**{part: features.pooled for part, features in branches.items()}, "fused": fused}

    def _fuse(
        self, images: Tensor, given: Mapping[str, Features], in_step: bool = False
    ) -> tuple[dict[str, Features], Tensor]:
        branches = {}
        for part, branch in self.branches().items():
            if part in given and in_step:
                branch.idle()
            branches[part] = given[part] if part in given else branch(images)
        if self.remembers:
            self.remembered.append({part: branches[part] for part in self.frozen() if part not in given})
        return branches, self.fuse(branches)

    def frozen(self) -> list[str]:
        """The branches of which nothing trains."""
        return [part for part, branch in self.branches().items() if branch.frozen]

    def fuse(self, branches: Mapping[str, Features]) -> Tensor:
        """What each branch gives → (B, out_features)."""
        return self.fusion(
            [features.pooled for features in branches.values()], [features.tokens for features in branches.values()]
        )

    def branches(self) -> dict[str, Backbone]:
        """The backbones that there are, cnn first."""
        both = {"cnn": self.cnn, "transformer": self.transformer}
        return {part: branch for part, branch in both.items() if branch is not None}

    def parts(self) -> list[str]:
        """The parts that this model has, with or without parameters."""
        return [*self.branches(), "fusion", "heads"]

    def select(self, rules: Sequence[str]) -> set[str]:
        """Names of the parameters that the rules make trainable; changes nothing.

        Args:
            rules: parts, `all`, or patterns of whole parameter names (`transformer.*layers.3*`).

        Raises:
            UserError: a rule matches nothing, or all of them together do.
            ValueError: the model has a parameter outside its parts, which no phase could speak of.
        """
        names = [name for name, _ in self.named_parameters()]
        stray = [name for name in names if name.partition(".")[0] not in PARTS]
        if stray:
            raise ValueError(f"parameters outside {', '.join(PARTS)}: {', '.join(stray)}")
        selected: set[str] = set()
        for rule in rules:
            matched = {name for name in names if _matches(rule, name)}
            if not matched and rule not in self.parts():
                raise UserError(
                    f"trainable: {rule!r} matches nothing in this model; its parts are "
                    f"{', '.join(self.parts())} (or all), and patterns match whole parameter names such as "
                    f"{names[0]}"
                )
            selected |= matched
        if not selected:
            raise UserError(
                f"trainable: {', '.join(rules) or 'no rule'} leaves nothing to train: those parts have no "
                "parameters; add heads"
            )
        return selected

    def checkpoint_activations(self, parts: Sequence[str]) -> None:
        """Have the blocks of these branches, and no others, computed again in the backward pass instead of kept.

        Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". A branch that is frozen keeps nothing anyway.

        Raises:
            UserError: there is no such branch, or timm can't do it.
        """
        branches = self.branches()
        for part in parts:
            if part not in branches:
                raise UserError(
                    f"train.checkpoint_activations: this model has no {part}; {', '.join(branches)} would do"
                )
        for part, branch in branches.items():
            branch.checkpoint_activations(part in parts)

    def compile_blocks(self) -> None:
        """As `Backbone.compile_blocks`, in each branch."""
        for branch in self.branches().values():
            branch.compile_blocks()

    def set_trainable(self, rules: Sequence[str]) -> None:
        """Set `requires_grad` of every parameter; wholly frozen branches go to eval mode and run without a graph.

        Raises:
            UserError, ValueError: as `select`; nothing has changed then.
        """
        selected = self.select(rules)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in selected)
        for part, branch in self.branches().items():
            branch.frozen = not any(name.startswith(f"{part}.") for name in selected)
        self.train(self.training)


def build_model(
    config: ModelConfig,
    tasks: Mapping[str, TaskConfig],
    classes: Mapping[str, int],
    image_size: int,
    seed: int,
    load: bool = True,
    balance: bool = False,
) -> Hybrid:
    """Build the model on the CPU (or the meta device, inside `torch.device("meta")`; then nothing is loaded).

    Fresh parameters depend on the seed and their own part or task alone: not on what was drawn before, on whether
    weights were loaded, or on the other tasks. The global random state stays as it was.

    Args:
        classes: number of labels of each classification task.
        image_size: side of the pictures in pixels.
        load: False skips `weights:`, and its policy: for a resume, which brings its own.
        balance: Whether the tasks' weights in the loss are learned.

    Raises:
        UserError: as `check_model`, and for weights that don't fit.
    """
    branches: dict[str, Backbone | None] = {"cnn": None, "transformer": None}
    sources = {}
    for part, branch in _configured(config).items():
        check_name(part, branch.name)
        if load:
            sources[part] = find_weights(part, branch, config.allow_scratch)
    for part, branch in _configured(config).items():
        with _seeded(seed, part):
            backbone = Backbone(part, branch, image_size)
        if part in sources and not backbone.mean.is_meta:
            load_weights(part, branch, sources[part], backbone.net)
        branches[part] = backbone
    present = [branch for branch in branches.values() if branch is not None]
    find_fusion(config.fusion)  # a typo counts in a single-branch config too
    with _seeded(seed, "fusion"):
        fusion = build_fusion(config.fusion, [b.width for b in present], [b.token_width for b in present])
    heads = {}
    for task, task_config in tasks.items():
        if task_config.kind == "classification" and classes.get(task, 0) < 1:
            raise ValueError(f"classes: no number of labels for the task {task!r}")
        with _seeded(seed, "heads", task):
            heads[task] = HEADS[task_config.kind](fusion.out_features, classes.get(task, 0), config.dropout)
    learned = Balance(len(tasks)) if balance else None
    return Hybrid(branches["cnn"], branches["transformer"], fusion, heads, learned)


def fit_weights(config: ModelConfig, state: Mapping[str, Tensor], model: Hybrid) -> dict[str, Tensor]:
    """A whole model's weights from another picture size, as `model` holds them: see `fit_positions`.

    Args:
        config: Of both models.
        state: By the names of `Hybrid`. What fits stays the tensor that it is.

    Raises:
        UserError: timm can't resample a branch's tables.
    """
    fitted = dict(state)
    for part, branch in model.branches().items():
        prefix = f"{part}.net."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        found = fit_positions(f"the {part} of another size", _configured(config)[part], own, branch.net)
        fitted.update({prefix + name: value for name, value in found.items()})
    return fitted


def check_model(config: ModelConfig, image_size: int) -> None:
    """Find what can be found wrong without memory or time: names, kwargs, picture size, fusion, and where the weights
    are (`hub` weights are downloaded into the cache here). Whether a file fits shows only when it is loaded.

    Raises:
        UserError: says what is wrong, under which key, and what would do.
    """
    find_fusion(config.fusion)
    for part, branch in _configured(config).items():
        probe(part, branch, image_size)
        find_weights(part, branch, config.allow_scratch)


def describe(model: Hybrid) -> dict[str, dict[str, int]]:
    """Parameters of each part and of `all`: `total` and `trainable`. To be asked before ZeRO 3 takes them away."""
    counts = {part: {"total": 0, "trainable": 0} for part in [*model.parts(), "all"]}
    for name, parameter in model.named_parameters():
        for key in (name.partition(".")[0], "all"):
            counts[key]["total"] += parameter.numel()
            counts[key]["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return counts


def _configured(config: ModelConfig) -> dict[str, BranchConfig]:
    both = {"cnn": config.cnn, "transformer": config.transformer}
    return {part: branch for part, branch in both.items() if branch is not None}


def _matches(rule: str, name: str) -> bool:
    if rule == "all":
        return True
    return name.partition(".")[0] == rule if rule in PARTS else fnmatchcase(name, rule)


@contextmanager
def _seeded(seed: int, *names: str) -> Iterator[None]:
    """Within it, torch's CPU generator starts from these values; afterwards it is as it was."""
    digest = hashlib.sha256(":".join([str(seed), *names]).encode()).digest()
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
    finally:
        generator.set_state(before)
