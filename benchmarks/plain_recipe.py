"""The plain recipe: what a script for this task looks like, from the libraries' own pieces. What others are timed by.

    python benchmarks/plain_recipe.py DATA OUT --config FILE --batch 32 --epochs a=2 b=2 c=4
                                      --rates a=2e-3 b=2e-3 c=4e-3 [--seed 0] [--weights FILE] [--changes key=value …]

One process, fp32, PIL and torchvision, loader processes, everything in the graph, AdamW with a warm-up and a cosine,
a full torch.save each epoch. DATA holds train.csv, train/, val.csv and val/. OUT gets last.pth and score.json: of the
last phase's best epoch, as `val/score` is made up. Weights come from a run's model.safetensors, or are random.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from hybrid_dist.config import Config, load_config
from hybrid_dist.model.backbones import sized_kwargs

TRAINS = {"a": ("heads",), "b": ("heads", "transformer"), "c": ("heads", "transformer", "cnn")}
SCORES = ("clarity", "block")
SHARES = {"type": 0.5, "airline": 0.2, "clarity": 0.15, "block": 0.15}
"""Of `val/score`."""


def rows_of(data: Path, split: str) -> list[dict[str, str]]:
    """A table's rows."""
    with (data / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Pictures(Dataset):  # type: ignore[type-arg]
    """A split: a normalised picture, class numbers (-1: none), scores (NaN: none)."""

    def __init__(self, data: Path, split: str, classes: dict[str, list[str]], size: int) -> None:
        self.rows, self.folder, self.classes = rows_of(data, split), data / split, classes
        means = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.transform = Compose([Resize((size, size)), ToTensor(), Normalize(*means)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        labels: dict[str, float] = {
            task: names.index(row[f"{task}name"]) if row[f"{task}name"] else -1 for task, names in self.classes.items()
        }
        labels |= {task: float(row[task]) if row[task] else math.nan for task in SCORES}
        return self.transform(Image.open(self.folder / row["filename"]).convert("RGB")), labels


class Net(nn.Module):
    """Two backbones, their features side by side, a head for each task."""

    def __init__(self, config: Config, classes: dict[str, list[str]], weights: Path | None) -> None:
        super().__init__()
        size = config.data.image_size
        branches = {"cnn": config.model.cnn, "transformer": config.model.transformer}
        self.cnn, self.transformer = (
            # A run's weights want its windows; by itself timm pads maps that its own don't divide.
            self.backbone(branch.name, self.own(branch, size) if weights is None else sized_kwargs(part, branch, size))
            for part, branch in branches.items()
        )
        if weights is not None:
            held = load_file(weights)
            for part in ("cnn", "transformer"):
                start = f"{part}.net."
                own = {name.removeprefix(start): held[name] for name in held if name.startswith(start)}
                getattr(self, part).load_state_dict(own)
        width = self.cnn.num_features + self.transformer.num_features
        self.heads = nn.ModuleDict({f"{task}_head": nn.Linear(width, len(names)) for task, names in classes.items()})
        for task in SCORES:
            self.heads[f"{task}_head"] = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
        self.dropout = nn.Dropout(config.model.dropout)

    @staticmethod
    def own(branch: Any, size: int) -> dict[str, Any]:
        return {**branch.kwargs, **({"img_size": size} if "swin" in branch.name else {})}

    @staticmethod
    def backbone(name: str, kwargs: dict[str, Any]) -> Any:
        kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()}
        return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)

    def forward(self, images: Any) -> dict[str, Any]:
        fused = self.dropout(torch.cat([self.cnn(images), self.transformer(images)], 1))
        return {name.removesuffix("_head"): head(fused) for name, head in self.heads.items()}


def loss_of(outputs: dict[str, Any], labels: dict[str, Any], config: Config) -> Any:
    """The tasks' mean losses, with their weights."""
    total = 0.0
    for task, output in outputs.items():
        if task in SCORES:
            target = labels[task].float()
            known = ~torch.isnan(target)
            part = F.smooth_l1_loss(output.squeeze(1)[known], target[known])
        else:
            part = F.cross_entropy(output, labels[task], ignore_index=-1)
        total = total + config.tasks[task].weight * torch.nan_to_num(part)
    return total


@torch.no_grad()
def score(model: Any, loader: Any) -> float:
    """`val/score`."""
    model.eval()
    right, count = dict.fromkeys(SHARES, 0.0), dict.fromkeys(SHARES, 0)
    for images, labels in loader:
        for task, output in model(images).items():
            if task in SCORES:
                target = labels[task].float()
                known = ~torch.isnan(target)
                right[task] += float((1 - (output.squeeze(1) - target).abs())[known].sum())
            else:
                known = labels[task] >= 0
                right[task] += float((output.argmax(1) == labels[task])[known].sum())
            count[task] += int(known.sum())
    return sum(share * right[task] / count[task] for task, share in SHARES.items())


def phase(model: Any, name: str, epochs: float, rate: float, loaders: Any, config: Config, out: Path) -> float:
    """Train a phase; its best score."""
    train, val = loaders
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad = parameter_name.split(".")[0] in TRAINS[name]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.05)
    steps = round(epochs * len(train))
    warm = max(1, round(0.05 * steps))

    def shape(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    best, done, epoch = 0.0, 0, 0
    while done < steps:
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            loss_of(model(images), labels, config).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            done += 1
            if done == steps:
                break
        best = max(best, score(model, val))
        state = {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "scheduler": scheduler.state_dict()}, out / "last.pth")
        epoch += 1
    return best


def numbers(texts: list[str]) -> dict[str, float]:
    """`a=2` … as a dictionary."""
    return {name: float(value) for name, _, value in (text.partition("=") for text in texts)}


def main() -> None:
    """Parse, train, write the score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--epochs", nargs="+", required=True, help="by phase, in order")
    parser.add_argument("--rates", nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--changes", nargs="*", default=[], help="of the config")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.changes)
    rows = rows_of(arguments.data, "train")
    classes = {task: sorted({row[f"{task}name"] for row in rows} - {""}) for task in ("type", "airline")}
    torch.manual_seed(arguments.seed)
    size = config.data.image_size
    loaders = (
        DataLoader(Pictures(arguments.data, "train", classes, size), arguments.batch, shuffle=True, num_workers=2),
        DataLoader(Pictures(arguments.data, "val", classes, size), arguments.batch, num_workers=2),
    )
    model, best = Net(config, classes, arguments.weights), 0.0
    rates = numbers(arguments.rates)
    for name, epochs in numbers(arguments.epochs).items():
        best = phase(model, name, epochs, rates[name], loaders, config, arguments.out)
    (arguments.out / "score.json").write_text(json.dumps({"score": best}), encoding="utf-8")


if __name__ == "__main__":
    main()
