"""What the loss does about rare classes, against the papers' formulas worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybrid_dist.config import TaskConfig
from hybrid_dist.training.tails import balanced, logit_adjusted
from hybrid_dist.training.tasks import Task, make_tasks

COUNTS = np.array([4000, 50, 0, 2])
OUTPUT = torch.tensor([[2.0, 0.5, -1.0, 0.3], [0.0, 1.0, 0.0, 0.0], [0.1, 0.2, 5.0, -0.4], [0.5, 0.0, 0.0, 3.0]])
TARGET = torch.tensor([0, -1, 1, 3])


def make(tail: str, **more: float) -> Task:
    config = TaskConfig.model_validate({"kind": "classification", "column": "typename", "tail": tail, **more})
    return make_tasks({"type": config}, {"type": tuple("ABCD")}, {"type": COUNTS})[0]


def test_balanced_by_hand() -> None:
    """Catches: weights by the plain number, a loss whose scale depends on the tail, a division by a class of none."""
    weights = balanced(COUNTS).weights
    assert weights is not None
    effective = [(1 - 0.999**count) / (1 - 0.999) for count in (4000, 50, 2)]
    assert weights[[0, 1]] / weights[3] == pytest.approx([effective[2] / one for one in effective[:2]], rel=1e-5)
    assert (weights * COUNTS).sum() / COUNTS.sum() == pytest.approx(1.0)
    assert weights[2] == 0
    each = F.cross_entropy(OUTPUT[[0, 2, 3]], TARGET[[0, 2, 3]], reduction="none") * torch.from_numpy(
        weights[[0, 1, 3]]
    )
    found = make("balanced").training_losses(OUTPUT, TARGET, None)
    assert found.tolist() == pytest.approx([float(each[0]), 0.0, float(each[1]), float(each[2])])


def test_logit_adjusted_by_hand() -> None:
    """Catches: the prior taken off instead of added, one that is in val/loss too, infinity for an unseen class."""
    shifts = logit_adjusted(COUNTS).shifts
    assert shifts is not None
    assert shifts == pytest.approx(np.log(np.array([4000, 50, 1, 2]) / 4053), rel=1e-6)
    task = make("logit_adjusted", smoothing=0.1)
    each = F.cross_entropy(
        OUTPUT + torch.from_numpy(shifts), TARGET, ignore_index=-1, label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(task.training_losses(OUTPUT, TARGET, None), each)
    assert task.training_losses(OUTPUT, TARGET, None).isfinite().all()
    assert torch.equal(task.losses(OUTPUT, TARGET), make("none").training_losses(OUTPUT, TARGET, None))


@pytest.mark.parametrize("tail", ["balanced", "logit_adjusted"])
def test_no_label_at_all_keeps_the_graph(tail: str) -> None:
    """Catches: a rank without labels whose backward fails, or whose gradients are not zero."""
    output = torch.rand(4, 4, requires_grad=True)
    make(tail).training_losses(output, torch.full((4,), -1), None).sum().backward()
    assert output.grad is not None
    assert output.grad.abs().sum() == 0


def test_scores_have_no_rare_classes() -> None:
    """Catches: a key that does nothing."""
    with pytest.raises(ValueError, match="tail: none would do"):
        TaskConfig(kind="regression", column="clarity", tail="balanced")
