"""One point of a sweep over synthetic tasks: train a small model from nothing, measure its accuracy per slice.

The same parts as a run of `train.py` (data, model, initialisation, optimizer, schedule) without what a run of hours needs. The
output projection is applied where an answer is asked for and nowhere else: in MQAR that is one position in eight or fewer, and
for models of this size the vocabulary is most of the work. The loss is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.engine.base import EngineSettings
from megatron.engine.optim import build_optimizer, parameter_groups, set_learning_rate
from megatron.engine.schedule import ScheduleConfig, learning_rate
from megatron.engine.stages import LocalModel, build_local, run_stages
from megatron.errors import ConfigError
from megatron.model.config import ModelConfig
from megatron.model.cost import count_parameters
from megatron.model.loss import token_loss
from megatron.model.state_size import state_bytes, total
from megatron.parallel.mesh import Mesh
from megatron.synthetics.dataset import SyntheticDataset, read_slices
from megatron.synthetics.task import Examples


@dataclass(frozen=True)
class Training:
    """How a point is trained.

    epochs over the train slices in batches of batch_size; learning_rate falls as a cosine to 0 after `warmup` (share of all
    steps); clipping 0 is none. The test slices are measured `evaluations` times per epoch, and training ends when the mean of
    their accuracies reaches `early_stop`. seed: of data, order and initial weights.
    """

    learning_rate: float
    batch_size: int = 256
    epochs: int = 32
    warmup: float = 0.0
    weight_decay: float = 0.1
    clipping: float = 0.0
    evaluations: int = 1
    early_stop: float = 0.99
    seed: int = 123


@dataclass(frozen=True)
class Point:
    """One training of a sweep: everything that its result depends on.

    Attributes:
        name: its family, a curve of the figures.
        data: see `read_slices`.
        model: fields of `ModelConfig`; the vocabulary is the task's.
        training: see `Training`.
        tags: the keys that the grid varied, for tables.
    """

    name: str
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    tags: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """16 hex digits that name this point; the same parameters give the same key, whatever the family is called."""
        text = json.dumps([self.data, self.model, self.training], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def config(self) -> ModelConfig:
        """The model; a ConfigError where it is none."""
        rows = max(part.task.rows for part in read_slices(self.data, "train") + read_slices(self.data, "test"))
        try:
            return ModelConfig.from_dict({"vocab_size": rows, **self.model})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"family '{self.name}' describes no model", why=str(error)) from None


@dataclass(frozen=True)
class Measured:
    """Accuracies: per test slice, the share of its answers that were right, per example and then over examples."""

    slices: list[float]

    @property
    def mean(self) -> float:
        """Over the slices."""
        return sum(self.slices) / len(self.slices)


def answers(local: LocalModel, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [m, n] at the m positions that are asked for, labels [m], which example each belongs to [m])."""
    labels = torch.from_numpy(examples.labels)
    asked = labels >= 0
    flow = run_stages(local.stages[:-1], (torch.from_numpy(examples.inputs),))
    logits = run_stages(local.stages[-1:], (flow[0][asked][None],))
    assert isinstance(logits, Tensor)
    return logits[0], labels[asked], torch.nonzero(asked)[:, 0]


@torch.no_grad()
def measure(local: LocalModel, data: SyntheticDataset) -> Measured:
    """The accuracies on all examples of a test split."""
    sums = [[0.0, 0] for _ in data.stores]
    for number in range(data.batches_per_epoch):
        turn, examples = data.batch(number)
        logits, labels, rows = answers(local, examples)
        right = (logits.argmax(-1) == labels).double()
        of = torch.zeros(len(examples.inputs), 2, dtype=torch.float64)
        of.index_add_(0, rows, torch.stack([right, torch.ones_like(right)], 1))
        sums[turn][0] += float((of[:, 0] / of[:, 1]).sum())
        sums[turn][1] += len(examples.inputs)
    return Measured([right / count for right, count in sums])


def _test_set(point: Point, batch: int, seed: int) -> SyntheticDataset:
    slices = read_slices(point.data, "test")
    fitting = math.gcd(batch, *(part.examples for part in slices))  # every example is measured
    return SyntheticDataset(slices, seed, "test", fitting)


def run_point(point: Point) -> dict[str, Any]:
    """Train and measure; what goes into a line of the results: every parameter, accuracies, state, parameters, times.

    Raises:
        ConfigError: the point describes no data or no model.
    """
    started, before = time.monotonic(), time.process_time()
    config, plan = point.config(), Training(**point.training)
    train = SyntheticDataset(read_slices(point.data, "train"), plan.seed, "train", plan.batch_size)
    test = _test_set(point, plan.batch_size, plan.seed)
    settings = EngineSettings(
        seed=plan.seed, seq_length=train.seq_length, lr=plan.learning_rate, weight_decay=plan.weight_decay
    )
    torch.manual_seed(plan.seed)  # of dropout; all else is a function of its own seed
    local = build_local(config, Mesh.single(), settings, torch.device("cpu"))
    steps, history, taken = plan.epochs * train.batches_per_epoch, [], 0
    every = max(1, train.batches_per_epoch // plan.evaluations)
    optimizer = build_optimizer(parameter_groups(local.parameters, local.specs, plan.weight_decay), settings)
    curve = ScheduleConfig(plan.learning_rate, steps, "cosine", plan.warmup)
    for number in range(steps):
        set_learning_rate(optimizer, learning_rate(number, curve))
        loss = _step(local, optimizer, train.batch(number)[1], plan.clipping)
        taken = number + 1
        if taken % every == 0 or taken == steps:
            for stage in local.stages:
                stage.eval()
            measured = measure(local, test)
            for stage in local.stages:
                stage.train()
            history.append({"step": taken, "loss": loss, "accuracy": measured.mean, "slices": measured.slices})
            if measured.mean >= plan.early_stop or not math.isfinite(loss):
                break
    line = _line(point, config, test, history)
    times = {"seconds": time.monotonic() - started, "processor_seconds": time.process_time() - before}
    return {
        **line,
        "planned_steps": steps,
        **{name: round(value, 2) for name, value in times.items()},
        "torch": torch.__version__,
    }


def _step(local: LocalModel, optimizer: torch.optim.Optimizer, examples: Examples, clipping: float) -> float:
    """One optimizer step; its loss."""
    logits, labels, _ = answers(local, examples)
    loss = token_loss(logits[None], labels[None])
    optimizer.zero_grad()
    loss.backward()
    if clipping > 0:
        torch.nn.utils.clip_grad_norm_(list(local.parameters.values()), clipping)
    optimizer.step()
    return float(loss.detach())


def _line(point: Point, config: ModelConfig, test: SyntheticDataset, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was measured: the best accuracy with its slices, and how it came about."""
    best = max(history, key=lambda row: row["accuracy"])
    parts = state_bytes(config, max(store.task.seq_length for store in test.stores))
    return {
        "key": point.key(),
        **asdict(point),
        "accuracy": best["accuracy"],
        "slices": [
            {**store.task.parameters(), "examples": len(store), "accuracy": accuracy}
            for store, accuracy in zip(test.stores, best["slices"], strict=True)
        ],
        "final_accuracy": history[-1]["accuracy"],
        "steps": history[-1]["step"],
        "state_bytes": total(parts),
        "state": parts,
        "parameters": count_parameters(config)[0],
        "history": [{k: round(v, 5) for k, v in row.items() if k != "slices"} for row in history],
    }
