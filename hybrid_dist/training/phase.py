"""One phase: the loop. Step, log, validate, checkpoint, and stop when asked."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hybrid_dist.checkpoint import write_shard
from hybrid_dist.config import PhaseConfig
from hybrid_dist.data.order import steps_per_epoch
from hybrid_dist.distributed import Engine
from hybrid_dist.errors import UserError
from hybrid_dist.tracking import JsonLines, write_status
from hybrid_dist.training.optim import learning_rate
from hybrid_dist.training.publish import PREDICTIONS, publish_best
from hybrid_dist.training.state import TrainState
from hybrid_dist.training.step import LossLog, dropout_seed, label_counts, trace_of, train_step
from hybrid_dist.training.stop import Stopped
from hybrid_dist.training.validate import metrics_of, predictions_csv, raise_together, validate

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch
    from hybrid_dist.training.run import Job


@dataclass(frozen=True)
class Length:
    """A phase's duration in optimizer steps: epochs and steps are converted here, once."""

    total: int
    per_epoch: int

    @classmethod
    def of(cls, phase: PhaseConfig, samples: int, global_batch: int) -> Length:
        per_epoch = steps_per_epoch(samples, global_batch)
        total = phase.steps if phase.steps is not None else max(1, round((phase.epochs or 0) * per_epoch))
        return cls(total, per_epoch)

    def ends_epoch(self, step: int) -> bool:
        """Whether the model is validated after this many steps."""
        return step % self.per_epoch == 0 or step == self.total

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that the step-th step belonged to."""
        return max(1, math.ceil(step / self.per_epoch))


@dataclass(frozen=True)
class Layout:
    """What a model's weights look like before an engine takes them apart."""

    shapes: dict[str, torch.Size]
    buffers: frozenset[str]
    """Names of the persistent buffers."""

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return cls(shapes, frozenset(model.state_dict().keys() - shapes.keys()))

    def held_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """The persistent buffers' present values."""
        return {name: buffer for name, buffer in model.named_buffers() if name in self.buffers}


class PhaseLoop:
    """Takes a phase from where `state` stands to its end."""

    def __init__(self, job: Job, phase: PhaseConfig, state: TrainState, engine: Engine, layout: Layout):
        self.job, self.phase, self.state, self.engine, self.layout = job, phase, state, engine, layout
        self.config, self.topology, self.control = job.config, job.topology, job.topology.control
        self.length = job.length(phase)
        self.losses = LossLog(self.control, state.pending)
        self.metrics_file = self._lines("metrics")
        self.trace_file = self._lines("trace") if self.config.debug.trace else None
        self.saved_at = state.phase_step
        self._waited = self._worked = 0.0
        self._seen = 0
        self.lr = 0.0
        self.last_loss = ""

    def _lines(self, name: str) -> JsonLines | None:
        if not self.topology.is_main:
            return None
        return JsonLines(self.job.folder / f"{name}.jsonl", self.state.positions.get(name, 0))

    def run(self) -> None:
        """Make the phase's steps.

        Raises:
            Stopped: someone asked; a checkpoint is written.
        """
        train, val = self.job.loaders(self.phase, self.state.phase_step, self.length.total)
        batches = iter(train)
        self._begin()
        while self.state.phase_step < self.length.total:
            began = time.monotonic()
            step_batches, problem = self._load(batches)
            self._waited += time.monotonic() - began
            counts = self._agree(step_batches, problem)
            self._step(step_batches, counts)
            self._worked += time.monotonic() - began
            self._after_step(val)
        self.job.terminal.end()
        for file in (self.metrics_file, self.trace_file):
            if file is not None:
                file.close()

    def _begin(self) -> None:
        label = f"phase {self.phase.name}"
        self.job.terminal.begin(label, self.state.phase_step, self.length.total)

    def _load(self, batches: Iterator[Batch]) -> tuple[list[Batch], str | None]:
        """The step's micro batches, or what is wrong with them."""
        try:
            return [next(batches) for _ in range(self.job.accumulation)], None
        except UserError as error:
            return [], str(error)

    def _agree(self, batches: list[Batch], problem: str | None) -> dict[str, int]:
        """The global batch's labels by task. Here all ranks also learn that one has a problem, or was asked to stop."""
        tasks = self.job.tasks
        facts = [*label_counts(tasks, batches), int(self.job.stop.requested()), int(problem is not None)]
        *counts, samples, asked, problems = self.control.total(facts)
        if problems:
            raise_together(self.control, problem)
        if asked:
            self._stop()
        self.state.samples += samples
        self._seen += samples
        return {task.name: count for task, count in zip(tasks, counts, strict=True)}

    def _step(self, batches: list[Batch], counts: dict[str, int]) -> None:
        done = self.state.phase_step
        self.lr = learning_rate(done, self.length.total, self.phase.lr, self.phase.warmup)
        self.engine.set_lr(self.lr)
        world, rank, seed = self.topology.world_size, self.topology.rank, self.config.run.seed
        # Dropout follows from where a micro batch stands in the global batch, not from the rank that computes it.
        seeds = [dropout_seed(seed, self.phase.name, done, micro * world + rank) for micro in range(len(batches))]
        shares = train_step(self.engine, self.job.tasks, batches, counts, seeds, self.topology.device)
        self.losses.add(shares)
        self.state.phase_step += 1
        self.state.step += 1
        if self.config.debug.trace:
            self._trace(batches)

    def _trace(self, batches: list[Batch]) -> None:
        traced = trace_of(batches, self.control)
        loss = self.losses.rows()[-1][0]
        if traced is not None and self.trace_file is not None:
            rows, digest = traced
            position = {"phase": self.phase.name, "step": self.state.step}
            self.trace_file.write({**position, "sample_ids": rows, "digest": digest, "loss": loss})

    def _after_step(self, val: Any) -> None:
        step = self.state.phase_step
        ends_epoch = self.length.ends_epoch(step)
        if ends_epoch or step % self.config.tracking.log_every == 0:
            self._log()
        self.job.terminal.advance(step, self._note())
        every = self.config.checkpoint.every_steps
        if ends_epoch:
            self._validate(val)
        elif every and step % every == 0:
            self._save({})

    def _note(self) -> str:
        score = f"best {self.state.best_score:.4f}" if self.state.best_score is not None else ""
        return f"{self.last_loss} {score}".strip()

    def _where(self) -> dict[str, Any]:
        return {
            "phase": self.phase.name,
            "epoch": self.length.epoch(self.state.phase_step),
            "step": self.state.step,
            "samples": self.state.samples,
            "time": time.time(),
        }

    def _log(self) -> None:
        began = time.monotonic()
        total, *each = self.losses.take_mean()
        # A GPU runs behind the loop; here the loop has waited for it.
        self._worked += time.monotonic() - began
        if not math.isfinite(total):
            where = f"phase {self.phase.name}, step {self.state.step}"
            raise UserError(f"{where}: the loss is {total}; a lower learning rate would do", shared=True)
        names = [task.name for task in self.job.tasks]
        values = {"train/loss": total, **{f"train/loss_{name}": loss for name, loss in zip(names, each, strict=True)}}
        values |= {"train/lr": self.lr, "train/grad_norm": self.engine.grad_norm()}
        if self._worked > 0:
            values["perf/images_per_s"] = self._seen / self._worked
            values["perf/data_wait"] = self._waited / self._worked
        values["perf/peak_memory_gb"] = _peak_memory_gb(self.topology.device)
        self._waited = self._worked = 0.0
        self._seen = 0
        self.last_loss = f"loss {total:.4f}"
        if self.metrics_file is not None:
            self.metrics_file.write({**self._where(), **values})
            write_status(self.job.folder, "running", self.phase.name, self.state.step, self.topology.label)

    def _validate(self, val: Any) -> None:
        job = self.job
        job.terminal.begin("validation", 0, len(job.val_table))
        seen = 0

        def tick(samples: int) -> None:
            nonlocal seen
            seen += samples * self.topology.world_size
            job.terminal.advance(min(seen, len(job.val_table)))

        result = validate(self.engine, job.tasks, val, self.control, self.topology.device, tick)
        metrics = self.control.from_main(metrics_of(result, job.tasks) if result is not None else None)
        assert metrics is not None
        files: dict[str, str] = {}
        found = metrics["val/score"] or 0.0
        if self.state.best_score is None or found > self.state.best_score:
            self.state.best_score, self.state.best_step = found, self.state.step
            self.state.best_metrics = metrics
            if result is not None:
                names = [job.val_table.filename(int(row)) for row in result.rows]
                files[PREDICTIONS] = predictions_csv(result, job.tasks, names)
        if self.metrics_file is not None:
            self.metrics_file.write({**self._where(), **metrics})
        job.terminal.end()
        epoch = self.length.epoch(self.state.phase_step)
        names = [task.name for task in job.tasks]
        job.terminal.metrics(f"phase {self.phase.name}, epoch {epoch}, step {self.state.step}", metrics, names)
        self._save(files)
        self._begin()

    def _save(self, files: dict[str, str]) -> None:
        """Write a checkpoint; if it is the phase's best so far, make it `best.safetensors` from there."""
        self.state.finished = self.state.phase_step == self.length.total
        self.state.pending = self.losses.rows()
        self.state.engine = self.engine.extra_state()
        for name, lines in (("metrics", self.metrics_file), ("trace", self.trace_file)):
            if lines is not None:
                self.state.positions[name] = lines.position()
        buffers = self.layout.held_buffers(self.engine.model) if self.topology.is_main else {}

        def write(path: Path) -> None:
            write_shard(path, self.engine.pieces(), buffers)

        shapes = {name: list(shape) for name, shape in self.layout.shapes.items()}
        state = {**self.state.state_dict(), "topology": self.topology.label, "shapes": shapes}
        path = self.job.store.save(f"{self.phase.name}-{self.state.step}", state, write, files)
        self.saved_at = self.state.phase_step
        if self.topology.is_main:
            publish_best(self.job.folder, path)
        self.control.barrier()

    def _stop(self) -> None:
        if self.saved_at != self.state.phase_step:
            self._save({})
        self.job.terminal.end()
        reasons = [reason for reason in self.control.to_all(self.job.stop.reason) if reason]
        raise Stopped(reasons[0] if reasons else "asked to stop")


def _peak_memory_gb(device: torch.device) -> float:
    """The device's peak of allocated memory; on a CPU the process's resident peak. In 10⁹ bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
