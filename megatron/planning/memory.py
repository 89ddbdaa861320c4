"""How much memory a training step takes on one rank, found by running its stages on fake tensors: shapes without numbers.

Each kind of block is run forward and backward once under a counter of live storage; what a run of many blocks takes is put
together from that. So the count follows whatever a mixer keeps for its backward, and needs no formula per mixer. Weights,
masters and moments are counted from the cut parameters. The plain PyTorch path is counted; fused kernels keep less.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.engine.base import DTYPES, EngineSettings
from megatron.engine.stages import check_mesh, run_stages
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.linear_loss import linear_token_loss
from megatron.model.loss import token_loss
from megatron.model.objectives import objective_loss
from megatron.model.partition import balanced_bounds, stage_costs
from megatron.model.stages import BlockStage, stages_of
from megatron.ops.rotary import _table as table
from megatron.parallel.mesh import Mesh
from megatron.parallel.tensor import shard_model
from megatron.planning.fixed_memory import Buffers, deepspeed_buffers, plain_buffers, share

# Mixers choose their chunk by the lowest log decay of the batch; this is what fresh weights give.
_TYPICAL = -1.0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank. `total` is the fullest moment of a step; each part is at its own largest, not all at that moment.

    activations: kept for the backward by blocks and embedding; logits: the output layer and the loss; workspace: what else is
    alive at the fullest moment (a block's own backward, buckets of DeepSpeed, inputs); recomputed: activations if every block
    were recomputed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    total: int
    parameters: int
    recomputed: int


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make, as long as they live. `peak` can be set back to `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is freed; one that is known already is not counted again."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else _TYPICAL  # fake tensors have no numbers to give
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


@dataclass(frozen=True)
class _Piece:
    """One piece of the chain, in bytes above what was alive before it.

    kept: after its forward. forward, backward: the most during either; backward includes kept and the gradients it makes.
    """

    kept: int
    forward: int
    backward: int
    gradients: int


Known = dict[tuple[object, ...], _Piece]


def _measure(run: Callable[[Tensor], Tensor], modules: Sequence[nn.Module], x: Tensor) -> _Piece:
    """Run a piece forward and backward; `x` is its input, which the piece before keeps."""
    live = _Live()
    with live:
        live.add(x)
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                live.add(tensor)
        before = live.now
        live.peak = before
        out = run(x)
        kept, forward = live.now - before, live.peak - before
        grad = torch.empty_like(out) if out.dim() else None
        live.peak = live.now
        torch.autograd.backward([out], [grad] if grad is not None else None)
        backward = live.peak - before
    params = {id(p): p for module in modules for p in module.parameters()}
    # Gradients of parameters that one product made are pieces of one storage.
    storages = [p.grad.untyped_storage() for p in params.values() if p.grad is not None]
    made = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    for param in params.values():
        param.grad = None
    return _Piece(kept, forward, backward, made)


@dataclass(frozen=True)
class _Local:
    """This rank's stages on fake tensors."""

    stages: list[nn.Module]
    first: bool
    last: bool
    parameters: list[nn.Parameter]


def _local(config: ModelConfig, mesh: Mesh, settings: EngineSettings) -> _Local:
    """Like `stages.build_local`, on fake tensors and without values."""
    check_mesh(config, mesh)
    model = build_model(config)
    stages = stages_of(model, settings.kernel_backend, logits=not settings.loss_chunk_tokens)
    bounds = balanced_bounds(stage_costs(settings.partition_method, stages, config), mesh.pp)
    shard_model(model, param_specs(config), mesh)
    local = [s.module for s in stages[bounds[mesh.pp_rank] : bounds[mesh.pp_rank + 1]]]
    parameters = {id(p): p for stage in local for p in stage.parameters()}
    for param in parameters.values():
        param.data = param.data.to(DTYPES[settings.dtype])
    return _Local(list(local), mesh.pp_rank == 0, mesh.pp_rank == mesh.pp - 1, list(parameters.values()))


def _head(settings: EngineSettings, mesh: Mesh, tail: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Norm, output projection and loss."""
    seen = run_stages(list(tail), (x,))
    assert isinstance(seen, Tensor)
    labels = torch.zeros(x.shape[:2], dtype=torch.long)
    mask = torch.ones(x.shape[:2])

    def mean(logits: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        if settings.loss_chunk_tokens:
            matrix = next(p for p in tail[-1].parameters())
            return linear_token_loss(
                logits, matrix, y, w, None, block=settings.loss_chunk_tokens, backend=settings.kernel_backend
            )
        return token_loss(logits, y, w)

    return objective_loss(settings.objective, seen, labels, mask, mean)[0]


@dataclass(frozen=True)
class _Chain:
    """Pieces of one micro batch in order; the head is the last where `has_head`."""

    pieces: list[_Piece]
    has_head: bool
    tokens: int  # bytes of one micro batch as it comes from the data


def _chain(config: ModelConfig, mesh: Mesh, settings: EngineSettings, local: _Local, known: Known) -> _Chain:
    """Measure each kind of block once, the embedding and the head."""
    b, s = settings.micro_batch, settings.seq_length
    dtype, interval = DTYPES[settings.dtype], settings.activation_checkpoint_interval
    blocks = [stage for stage in local.stages if isinstance(stage, BlockStage)]
    pieces: list[_Piece] = []
    if local.first:
        size = b * s * config.hidden_size * dtype.itemsize
        table = sum(p.numel() * dtype.itemsize for p in local.stages[0].parameters())
        pieces.append(_Piece(size, size, size * 2 + table, table))
    pieces += _block_pieces(config, settings, blocks, interval, known)
    if local.last:
        tail = [stage for stage in local.stages[len(local.stages) - 2 :] if not isinstance(stage, BlockStage)]
        x = torch.empty(b, s, config.hidden_size, dtype=dtype, requires_grad=True)
        pieces.append(_measure(lambda x: _head(settings, mesh, tail, x), tail, x))
    return _Chain(pieces, local.last, b * s * (8 + 8 + 4))


def _block_pieces(
    config: ModelConfig, settings: EngineSettings, blocks: Sequence[BlockStage], interval: int, known: Known
) -> list[_Piece]:
    """Runs of `interval` blocks (1 without recomputation); equal ones are measured once."""
    shape = (settings.micro_batch, settings.seq_length, config.hidden_size)
    pieces = []
    for at in range(0, len(blocks), interval or 1):
        part = blocks[at : at + (interval or 1)]
        key = (*shape, settings.dtype, interval, settings.kernel_backend, *(_kind(block) for block in part))
        if key not in known:
            x = torch.empty(*shape, dtype=DTYPES[settings.dtype], requires_grad=True)
            known[key] = _measure(lambda x, part=part: _through(part, x, interval), part, x)  # type: ignore[misc]
        pieces.append(known[key])
    return pieces


def _through(part: Sequence[nn.Module], x: Tensor, interval: int) -> Tensor:
    activations = run_stages(list(part), (x,), interval)
    return activations[0]


def _kind(block: BlockStage) -> str:
    """Blocks that take the same memory: the same mixer class with parameters of the same shapes."""
    shapes = ",".join(str(tuple(p.shape)) for p in block.parameters())
    return f"{type(block.body.token_mixer).__name__} {shapes}"  # type: ignore[union-attr]


def rank_footprint(
    config: ModelConfig,
    mesh: Mesh,
    settings: EngineSettings,
    deepspeed: bool,
    *,
    resident: bool = False,
    known: Known | None = None,
    within: float | None = None,
) -> MemoryEstimate:
    """Memory of the rank `mesh.rank`.

    Args:
        mesh: sizes only (`Mesh.shape_only`).
        deepspeed: which engine's buffers are counted.
        resident: count DeepSpeed's bucket only as far as it is filled, as the resident set of a CPU process does. An
            accelerator gives all of it at once.
        known: what was measured before, for other meshes and settings of the same `config`; grows.
        within: bytes. A rank whose weights and optimizer alone take more is not measured further (`total` is those alone), and
            `recomputed` is not looked for.

    Raises:
        ConfigError: the model cannot be cut over the mesh.
    """
    known = {} if known is None else known
    table.cache_clear()  # tables are cached: fake ones must not meet true ones
    with FakeTensorMode(), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of looking at addresses of fake tensors
        local = _local(config, mesh, settings)
        count, width = sum(p.numel() for p in local.parameters), DTYPES[settings.dtype].itemsize
        if deepspeed:
            buffers = deepspeed_buffers(count, mesh, settings, resident)
        else:
            buffers = plain_buffers(count, width, settings.gradient_accumulation > 1)
        weights = (share(count, mesh) if deepspeed and settings.zero_stage == 3 else count) * width
        least = weights + buffers.optimizer + buffers.standing
        if within is not None and least > within:
            return MemoryEstimate(weights, buffers.gradients, buffers.optimizer, 0, 0, 0, least, count, 0)
        chain = _chain(config, mesh, settings, local, known)
        recomputed = 0
        if within is None:
            blocks = [stage for stage in local.stages if isinstance(stage, BlockStage)]
            recomputed = sum(piece.kept for piece in _block_pieces(config, settings, blocks, 1, known))
            recomputed += chain.pieces[0].kept if local.first else 0
    table.cache_clear()
    return _assemble(chain, weights, buffers, recomputed, count, mesh, settings)


def _assemble(
    chain: _Chain, weights: int, shards: Buffers, recomputed: int, count: int, mesh: Mesh, settings: EngineSettings
) -> MemoryEstimate:
    """The fullest moment of a step from its pieces."""
    pieces = chain.pieces
    accumulates = settings.gradient_accumulation > 1
    flight = min(mesh.pp - mesh.pp_rank, settings.gradient_accumulation)
    held = [piece.kept for piece in pieces]
    activations = sum(held[:-1] if chain.has_head else held) + (flight - 1) * sum(held)
    made = sum(piece.gradients for piece in pieces)
    standing = weights + shards.optimizer + shards.standing + settings.gradient_accumulation * chain.tokens
    best, kept_then = 0, 0
    later = 0  # gradients that the pieces behind have made by now; the running sums of narrow weights are among `standing`
    for place in range(len(pieces) - 1, -1, -1):
        piece, before = pieces[place], sum(held[:place]) + (flight - 1) * sum(held)
        moment = before + max(piece.forward, piece.backward) + later
        if accumulates and shards.in_place:  # the sums of the micro batches before are there beside this piece's new gradients
            moment += made - later
        if moment > best:
            best, kept_then = moment, before + piece.kept
        later += 0 if shards.bucket_takes else piece.gradients
    peak = standing + max(best, shards.step)
    logits = pieces[-1].backward - pieces[-1].gradients if chain.has_head else 0
    workspace = max(0, peak - standing - kept_then - made) + shards.standing
    return MemoryEstimate(weights, shards.gradients, shards.optimizer, activations, logits, workspace, peak, count, recomputed)
