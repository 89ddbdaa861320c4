"""Bad numbers put into a running model: on one rank, in one micro batch, in one stage; and what the step did to its state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron.engine.base import Engine
from megatron.reliability.consensus import Consensus
from megatron.reliability.guard_options import GuardOptions
from megatron.reliability.stop import Control
from tests.training.runs import ACCUMULATION, Recorder, make_engine, options, train

KINDS = ("nan", "inf", "gradient", "loss")
WARM = 16


def plan(count: int, world: int, seed: int) -> dict[int, tuple[str, int, int]]:
    """Step -> (kind, rank, micro batch), the same on every rank; the window of the spike rule fills first."""
    rng = random.Random(seed)
    steps = [WARM + 2 + 2 * i for i in range(count)]
    return {step: (KINDS[i % 4], rng.randrange(world), rng.randrange(ACCUMULATION)) for i, step in enumerate(steps)}


def spoil(x: Tensor, kind: str) -> Tensor:
    """x with the fault in it: a number that is not finite, a gradient 1,000 times as large, or logits far off."""
    if kind == "gradient":
        return x + (x - x.detach()) * 999.0
    if kind == "loss":
        return x.flip(-1) * 50.0
    bad = torch.zeros_like(x)
    bad.view(-1)[x.numel() // 2] = float(kind)
    return x + bad


class Injector:
    """Spoils what this rank's last stage module gives, in the armed micro batch."""

    def __init__(self, stage: nn.Module) -> None:
        self.armed: tuple[str, int] | None = None
        self._calls = 0
        stage.register_forward_hook(self._hook)

    def arm(self, kind: str, micro: int) -> None:
        self.armed, self._calls = (kind, micro), 0

    def _hook(self, module: nn.Module, inputs: Any, out: Any) -> Any:
        if self.armed is None or not module.training:
            return None
        kind, micro = self.armed
        self._calls += 1
        if self._calls - 1 != micro:
            return None
        if isinstance(out, tuple):  # not the output: a loss spike is made there, a gradient spike anywhere
            return (spoil(out[0], "gradient" if kind == "loss" else kind), *out[1:])
        return spoil(out, kind)


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """All weights and all optimizer state of this rank, copied."""
    parts = {name: w.clone() for name, w in engine.weights().items()}
    for name, piece in engine.optimizer_slices().items():
        parts[f"{name}/master"] = piece.master.clone()
        parts[f"{name}/step"] = torch.tensor(piece.step)
        for moment, values in piece.moments.items():
            parts[f"{name}/{moment}"] = values.clone()
    return parts


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def injected(engine: Engine, todo: Mapping[int, tuple[str, int, int]]) -> Iterator[dict[int, bool]]:
    """Steps run inside put the planned faults in; gives step -> whether all state stayed the same."""
    injector, unchanged, taken = Injector(engine.local.stages[-1]), {}, [0]  # type: ignore[attr-defined]
    real = engine.train_step

    def train_step(batches: Any, lr: float) -> Any:
        taken[0] += 1
        kind, rank, micro = todo.get(taken[0], ("", -1, 0))
        if rank == engine.mesh.rank:
            injector.arm(kind, micro)
        before = snapshot(engine)
        result = real(batches, lr)
        unchanged[taken[0]] = same(before, snapshot(engine))
        injector.armed = None
        return result

    engine.train_step = train_step  # type: ignore[method-assign]
    yield unchanged


def guarded_run(kind: str, count: int, seed: int, mesh: dict[str, Any]) -> dict[str, Any]:
    """One rank's run with `count` faults; what each step did."""
    engine = make_engine(kind=kind, **mesh)
    control = Control(Consensus.of_all_ranks())
    todo = plan(count, engine.mesh.world_size, seed)
    rules = GuardOptions(budget=count, spike_sigma=8.0, spike_window=WARM)
    with injected(engine, todo) as unchanged:
        run, recorder = train(engine, None, options(WARM + 2 * count + 3, guard=rules), control=control)
    return {"todo": todo, "unchanged": unchanged, **_told(recorder), "applied": run.state.applied_iterations}


def _told(recorder: Recorder) -> dict[str, Any]:
    return {
        "skipped": [s.iteration for s in recorder.steps if s.skipped],
        "rates": [s.learning_rate for s in recorder.steps],
        "losses": [s.loss for s in recorder.steps],
        "reasons": {s.iteration: s.reason for s in recorder.skips},
        "samples": {s.iteration: [list(ids) for ids in s.sample_ids] for s in recorder.skips},
    }
