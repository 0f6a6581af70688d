"""Losses and metrics of tasks, against what is worked out by hand and by another library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hybrid_dist.config import TaskConfig
from hybrid_dist.data.dataset import Batch, Mix
from hybrid_dist.data.mix import WHOLE
from hybrid_dist.training.step import label_counts
from hybrid_dist.training.tasks import Metrics, Mixed, Task, make_tasks, score

NAN = math.nan


def make(name: str, kind: str, classes: tuple[str, ...] = (), **more: Any) -> Task:
    config = TaskConfig.model_validate({"kind": kind, "column": f"{name}name", **more})
    return make_tasks({name: config}, {name: classes})[0]


def test_classification_loss_by_hand() -> None:
    """Catches: a blank label that costs something, or a loss other than −log p of the true class."""
    task = make("type", "classification", ("A", "B", "C"))
    output = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 5.0, 5.0]])
    losses = task.losses(output, torch.tensor([0, -1, 2]))
    assert losses.tolist() == pytest.approx([-math.log(math.e**2 / (math.e**2 + 2)), 0.0, math.log(3)])
    assert task.valid(torch.tensor([0, -1, 2])).tolist() == [True, False, True]


def test_smoothing_is_torchs_in_training_alone() -> None:
    """Catches: a smoothed val/loss, a blank label that costs something, and smoothing where there are no classes."""
    task = make("type", "classification", ("A", "B", "C"), smoothing=0.3)
    output, target = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.0], [0.1, 0.2, 5.0]]), torch.tensor([0, -1, 2])
    logs = output.log_softmax(dim=1)
    by_hand = [-(0.8 * logs[0, 0] + 0.1 * logs[0, 1] + 0.1 * logs[0, 2]), 0.0]
    by_hand += [-(0.1 * logs[2, 0] + 0.1 * logs[2, 1] + 0.8 * logs[2, 2])]
    assert task.training_losses(output, target, None).tolist() == pytest.approx([float(loss) for loss in by_hand])
    torch.testing.assert_close(
        task.training_losses(output, target, None)[::2],
        F.cross_entropy(output, target.clamp(min=0), label_smoothing=0.3, reduction="none")[::2],
    )
    plain = make("type", "classification", ("A", "B", "C"))
    assert torch.equal(task.losses(output, target), plain.training_losses(output, target, None))
    with pytest.raises(ValueError, match="smoothing: 0 would do"):
        make("clarity", "regression", smoothing=0.1)


def test_mixed_losses_by_hand() -> None:
    """Catches: a missing label of one of the two pictures that costs something, or takes the other one's loss along;
    a mean of scores of which one is blank; parts of labels counted as whole ones or summed in an order that matters."""
    kind, value = make("type", "classification", ("A", "B", "C")), make("rust", "regression")
    output = torch.tensor([[2.0, 0.5, -1.0]] * 5)
    costs = (-output[0].log_softmax(dim=0)).tolist()
    own, partners = torch.tensor([0, -1, 2, -1, 1]), torch.tensor([1, 1, -1, -1, -1])
    shares = torch.tensor([0.75, 0.75, 0.75, 0.75, 1.0])
    losses = kind.training_losses(output, own, Mixed(shares, partners)).tolist()
    assert losses == pytest.approx(
        [0.75 * costs[0] + 0.25 * costs[1], 0.25 * costs[1], 0.75 * costs[2], 0.0, costs[1]], abs=1e-6
    )
    assert kind.labelled(own, Mixed(shares, partners)).tolist() == [1.0, 0.25, 0.75, 0.0, 1.0]

    scores, others = torch.tensor([0.4, NAN, 0.4, NAN, 0.8]), torch.tensor([0.8, 0.8, NAN, NAN, NAN])
    losses = value.training_losses(torch.full((5,), 0.9), scores, Mixed(shares, others)).tolist()
    assert losses == pytest.approx([0.5 * 0.4**2, 0.0, 0.0, 0.0, 0.5 * 0.1**2], abs=1e-6)
    assert value.labelled(scores, Mixed(shares, others)).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]

    def batch(places: slice) -> Batch:
        mix = Mix(
            {"type": partners[places], "rust": others[places]}, shares[places], torch.full_like(partners[places], -1)
        )
        labels = {"type": own[places], "rust": scores[places]}
        return Batch(torch.zeros(len(own[places])), labels, torch.arange(5)[places], mix=mix)

    whole = label_counts([kind, value], [batch(slice(0, 5))])
    assert whole == [3 * WHOLE, 2 * WHOLE, 5]
    halves = [label_counts([kind, value], [batch(half)]) for half in (slice(0, 2), slice(2, 5))]
    assert [sum(counts) for counts in zip(*halves, strict=True)] == whole


def test_regression_loss_by_hand() -> None:
    """Catches: NaN leaking from a blank label into loss or gradient, or a loss other than ½d²."""
    task = make("clarity", "regression")
    output = torch.tensor([0.2, 0.9, 0.5], requires_grad=True)
    losses = task.losses(output, torch.tensor([0.6, NAN, 0.5]))
    assert losses.tolist() == pytest.approx([0.5 * 0.4**2, 0.0, 0.0])
    losses.sum().backward()
    assert output.grad is not None
    assert output.grad.tolist() == pytest.approx([-0.4, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_no_label_at_all_keeps_the_graph(kind: str) -> None:
    """Catches: a rank without labels whose backward fails, or whose gradients are not zero (pytorch#73645)."""
    task = make("block", kind, ("A", "B"))
    output = torch.rand(4, 2, requires_grad=True) if kind == "classification" else torch.rand(4, requires_grad=True)
    target = torch.full((4,), -1) if kind == "classification" else torch.full((4,), NAN)
    task.losses(output, target).sum().backward()
    assert output.grad is not None
    assert output.grad.abs().sum() == 0


def test_classification_metrics_by_hand() -> None:
    """Catches: top 5 counted by another rule, F1 averaged over pictures or over classes that nobody labelled."""
    task = make("type", "classification", tuple("ABCDEFG"))
    rng = np.random.default_rng(0)
    prediction = rng.dirichlet(np.ones(7), 200).astype(np.float32)
    target = rng.integers(0, 6, 200)  # no picture of class G
    found = task.metrics(prediction, target)
    order = np.argsort(-prediction, axis=1)
    assert found["acc1"] == pytest.approx(np.mean(order[:, 0] == target))
    assert found["acc5"] == pytest.approx(np.mean([truth in row[:5] for truth, row in zip(target, order, strict=True)]))
    f1 = []
    for label in range(6):
        both = np.sum((order[:, 0] == label) & (target == label))
        f1.append(2 * both / (np.sum(order[:, 0] == label) + np.sum(target == label)))
    assert found["f1"] == pytest.approx(np.mean(f1))


def test_regression_metrics_by_hand() -> None:
    """Catches: RMSE for MAE, or a correlation of ranks."""
    task = make("block", "regression")
    prediction, target = np.array([0.1, 0.5, 0.9], np.float32), np.array([0.0, 0.5, 0.4], np.float32)
    found = task.metrics(prediction, target)
    assert found["mae"] == pytest.approx(0.2, abs=1e-6)
    assert found["rmse"] == pytest.approx(math.sqrt(0.26 / 3), abs=1e-6)
    assert found["corr"] == pytest.approx(np.corrcoef(prediction, target)[0, 1], abs=1e-6)
    assert task.metrics(np.full(3, 0.5, np.float32), target)["corr"] is None, "not defined, rather than NaN"


def test_score_is_the_contracts() -> None:
    """Catches: other weights than 0.5, 0.2, 0.15, 0.15; errors counted as qualities; a task without labels as zero."""
    names = {"type": "classification", "airline": "classification", "clarity": "regression", "block": "regression"}
    tasks = [make(name, kind, ("A", "B")) for name, kind in names.items()]
    metrics: dict[str, Metrics] = {
        "type": {"acc1": 0.8}, "airline": {"acc1": 0.6}, "clarity": {"mae": 0.1}, "block": {"mae": 0.2},
    }  # fmt: skip
    assert score(tasks, metrics) == pytest.approx(0.5 * 0.8 + 0.2 * 0.6 + 0.15 * 0.9 + 0.15 * 0.8)
    del metrics["airline"]
    assert score(tasks, metrics) == pytest.approx((0.5 * 0.8 + 0.15 * 0.9 + 0.15 * 0.8) / 0.8)


def test_columns_of_predictions() -> None:
    """Catches: a blank label written as a class or a number, or a probability that is another class's."""
    kind = make("airline", "classification", ("Red", "Blue"))
    columns = kind.columns(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32), np.array([-1, 1]))
    assert columns == {
        "airline_label": ["", "Blue"],
        "airline_prediction": ["Blue", "Red"],
        "airline_probability": ["0.750000", "0.900000"],
    }
    value = make("clarity", "regression")
    assert value.columns(np.array([0.5], np.float32), np.array([NAN], np.float32)) == {
        "clarity_label": [""],
        "clarity_prediction": ["0.500000"],
    }
