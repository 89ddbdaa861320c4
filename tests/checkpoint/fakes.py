"""An engine that only holds numbers: any mesh position, any ZeRO split, without training. For tests of files and bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import MOMENTS, Engine, EngineSettings, EvalResult, OptimizerSlice, StepResult
from megatron.parallel.mesh import Mesh
from megatron.parallel.shard_spec import ParamSpec, ShardKind, slice_of

_TABLE: tuple[tuple[str, tuple[int, ...], ShardKind, int], ...] = (
    ("model.embed_tokens.weight", (16, 8), "vocab", 0),
    ("model.layers.0.token_mixer.q_proj.weight", (8, 8), "column", 2),
    ("model.layers.0.token_mixer.o_proj.weight", (8, 8), "row", 2),
    ("model.layers.0.token_mixer.decay", (4,), "heads", 2),
    ("model.layers.0.token_norm.weight", (8,), "replicated", 2),
    ("model.scale", (), "replicated", 3),
)
SPECS = {name: ParamSpec(name, shape, cut, "input", True, stage) for name, shape, cut, stage in _TABLE}
MODEL = {"hidden_size": 8, "num_layers": 1, "layer_types": ["metala"], "layer_options": {"metala": {"k": 2}}}


def full(name: str, seed: int) -> Tensor:
    """The full value of a parameter, the same on every mesh."""
    generator = torch.Generator().manual_seed(seed * 1000 + list(SPECS).index(name))
    return torch.randn(SPECS[name].shape, generator=generator)


def part(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """What a rank holds of a full tensor."""
    piece = slice_of(SPECS[name].shape, SPECS[name].cut, mesh.tp_rank, mesh.tp)
    return tensor if piece.dim is None else tensor.narrow(piece.dim, piece.start, piece.stop - piece.start)


def holds(name: str, mesh: Mesh) -> bool:
    """Stage 0 and 2 lie on the first pipeline rank, the rest on the last; the embedding on both (a tied head)."""
    stage = SPECS[name].stage
    return mesh.pp == 1 or mesh.pp_rank == (0 if stage <= 2 else mesh.pp - 1) or (stage == 0 and mesh.pp_rank == mesh.pp - 1)


class FakeEngine(Engine):
    """Weights in bf16, masters and moments in fp32; optimizer ranges split over data-parallel ranks when `zero`."""

    kind: ClassVar[str] = "fake"

    def __init__(self, mesh: Mesh | None = None, seed: int = 1, zero: bool = True) -> None:
        self.mesh, self.specs = mesh or Mesh.single(), SPECS
        self.settings, self.device, self.dtype = EngineSettings(), torch.device("cpu"), torch.bfloat16
        self.zero, self.refreshed, self.extra = zero, False, {"loss_scale": {"value": float(2**seed)}}
        self.names = [name for name in SPECS if holds(name, self.mesh)]
        tied = self.mesh.pp > 1 and self.mesh.pp_rank == self.mesh.pp - 1
        self.replica_names = frozenset({"model.embed_tokens.weight"} if tied else set())
        self._parameters = {n: nn.Parameter(part(n, full(n, seed), self.mesh).bfloat16().clone()) for n in self.names}
        self.slices = {name: self._slice(name, seed) for name in self.names}

    def _slice(self, name: str, seed: int) -> OptimizerSlice:
        flat = part(name, full(name, seed), self.mesh).reshape(-1)
        size, mesh = flat.numel(), self.mesh
        start, stop = (size * mesh.dp_rank // mesh.dp, size * (mesh.dp_rank + 1) // mesh.dp) if self.zero else (0, size)
        moments = {m: flat[start:stop] * (i + 2) for i, m in enumerate(MOMENTS)}
        return OptimizerSlice(start, stop, flat[start:stop].clone(), moments, 40 + seed)

    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._parameters

    def train_step(self, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        raise NotImplementedError("a fake does not train")

    def eval_loss(self, micro_batches: Sequence[MicroBatch]) -> EvalResult:
        raise NotImplementedError("a fake does not evaluate")

    def optimizer_slices(self) -> dict[str, OptimizerSlice]:
        return dict(self.slices)

    def load_optimizer_slices(self, slices: Mapping[str, OptimizerSlice]) -> None:
        assert {n: (s.start, s.stop) for n, s in slices.items()} == {n: (s.start, s.stop) for n, s in self.slices.items()}
        self.slices = dict(slices)

    def refresh_master_from_weights(self) -> None:
        self.refreshed = True

    def extra_state(self) -> dict[str, Any]:
        return self.extra

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.extra = dict(state)

    def describe(self) -> str:
        return "fake"

    def same_as(self, other: FakeEngine, optimizer: bool = True) -> bool:
        """Whether all numbers are equal, bit for bit."""
        weights = all(torch.equal(self._parameters[n], other._parameters[n]) for n in self.names)
        if not optimizer:
            return weights
        states = all(
            torch.equal(a.master, b.master)
            and a.step == b.step
            and all(torch.equal(a.moments[m], b.moments[m]) for m in MOMENTS)
            for a, b in ((self.slices[n], other.slices[n]) for n in self.names)
        )
        return weights and states and self.extra == other.extra
