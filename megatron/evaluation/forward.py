"""Model passes of an evaluation: log-probabilities of given tokens, and generation; on one device or over a mesh.

One process per replica leads (first pipeline and tensor rank) and calls `score`, `prefill` and `advance`; the others loop in
`follow` and run the same pass on their shard. A small header tensor announces each call, so only tensors are communicated.
Logits are computed at the requested positions only, and log-probabilities are normalised over the tokenizer's true
vocabulary: padding rows would change them, and an exported folder has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.checkpoint.reshard import MeshPosition
from megatron.checkpoint.tensor_reader import CheckpointReader
from megatron.errors import CheckpointError, ConfigError
from megatron.generation.load import model_config_of
from megatron.layers.base import Context, State, input_names, inputs_of
from megatron.model.build import build_model, check_tensor_parallel, param_specs
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel, embed, run_blocks, step_blocks
from megatron.model.partition import block_bounds, stage_ranks
from megatron.ops.precision import in_accumulation_dtype, sum_dtype
from megatron.parallel.mesh import Mesh, rank_of
from megatron.parallel.shard_spec import ParamSpec
from megatron.parallel.tensor import local_slice, shard_model

_STOP, _SCORE, _PREFILL, _ADVANCE = range(4)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ROWS = 2048  # positions whose logits exist at a time
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class ForwardBatch:
    """Inputs of one pass.

    Attributes:
        tokens: ids [b, s].
        mask: [b, s] as in `layers/base.Context`.
        inputs: additional inputs of individual mixers (`Layer.Inputs`), by name: numbers, or integer tensors [b, s].
    """

    tokens: Tensor
    mask: Tensor | None = None
    inputs: Mapping[str, Tensor | int | None] = field(default_factory=dict)

    def to(self, device: torch.device) -> ForwardBatch:
        """The same on another device."""
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        return ForwardBatch(self.tokens.to(device), None if self.mask is None else self.mask.to(device), inputs)


class Forward:
    """One rank's shard of a model in evaluation mode.

    Args:
        model: the model with this rank's weights; modules of other pipeline stages are unused and may be on the meta device.
        mesh: the mesh, with its process groups.
        vocab_size: true vocabulary size, None for all rows.
        device: device of the weights.
        backend: see `Context`.
    """

    def __init__(self, model: LanguageModel, mesh: Mesh, vocab_size: int | None, device: torch.device, backend: str = "auto"):
        self.model, self.mesh, self.device, self.backend = model, mesh, device, backend
        self.config = model.config
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        start, stop = block_bounds(model.config.num_layers, mesh.pp)[mesh.pp_rank :][:2]
        self.blocks = model.model.blocks()[start:stop]
        self.mixers = [block.token_mixer for block in model.model.blocks()]
        self.input_names = input_names(self.mixers)
        self.first, self.last = mesh.pp_rank == 0, mesh.pp_rank == mesh.pp - 1
        self._state: list[State] = []

    @property
    def leads(self) -> bool:
        """Whether this rank drives its replica."""
        return self.first and self.mesh.tp_rank == 0

    # called by the leading rank

    def score(self, rows: ForwardBatch, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Score targets.

        Args:
            rows: inputs of the pass.
            places: [m, 2], (row, position of the token before the target).
            targets: [m] ids.

        Returns:
            Log-probabilities [m], and whether each target is the most likely token [m].
        """
        rows, places, targets = self._announce(_SCORE, rows, places, targets)
        scores = self._score(rows, places, targets).cpu()
        return scores[0], scores[1] > 0

    def prefill(self, rows: ForwardBatch) -> Tensor:
        """Logits [b, n] in fp32 or fp64 after each row; stores the state for `advance`."""
        return self._prefill(self._announce(_PREFILL, rows)[0])

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits [b, n] after one more token [b] per row."""
        return self._advance(self._announce(_ADVANCE, ForwardBatch(tokens[:, None]))[0].tokens[:, 0])

    def stop(self) -> None:
        """Release the other ranks."""
        if self.mesh.tp * self.mesh.pp > 1:
            self._header([_STOP])

    # called by the other ranks

    def follow(self) -> None:
        """Run the leading rank's calls until it stops."""
        while True:
            kind, rows, places, targets = self._receive()
            if kind == _STOP:
                return
            if kind == _SCORE:
                self._score(rows, places, targets)
            elif kind == _PREFILL:
                self._prefill(rows)
            else:
                self._advance(rows.tokens[:, 0])

    # the passes, identical on all ranks

    @torch.inference_mode()
    def _score(self, rows: ForwardBatch, places: Tensor, targets: Tensor) -> Tensor:
        x, _ = self._run(rows, None)
        scores = torch.zeros(2, len(targets), dtype=sum_dtype(x.dtype))
        scores = scores.to(self.device)
        if self.last:
            x = self.model.model.final_norm(x[places[:, 0], places[:, 1]])
            for start in range(0, len(targets), _ROWS):
                chunk = slice(start, start + _ROWS)
                logits, chunk_targets = self._logits(x[chunk]), targets[chunk]
                scores[0, chunk] = logits.log_softmax(-1).gather(-1, chunk_targets[:, None])[:, 0]
                scores[1, chunk] = (logits.argmax(-1) == chunk_targets).to(scores.dtype)
        return self._from_last(scores)

    @torch.inference_mode()
    def _prefill(self, rows: ForwardBatch) -> Tensor:
        batch = len(rows.tokens)
        sample = next(self.blocks[0].parameters())
        self._state = [block.token_mixer.init_state(batch, sample.dtype, self.device) for block in self.blocks]
        if self.first:
            self._state += self.model.model.embed_tokens.init_state(batch, self.device)
        x, self._state = self._run(rows, self._state)
        return self._next_logits(x[:, -1])

    @torch.inference_mode()
    def _advance(self, tokens: Tensor) -> Tensor:
        inner, ctx, own_count = self.model.model, Context(backend=self.backend), len(self.blocks)
        if self.first:
            x, tail = embed(inner.embed_tokens, inner.embed_tokens(tokens[:, None]), Context(), self._state)
            x = x[:, 0]
        else:
            x, tail = self._from_previous((len(tokens), self.config.hidden_size)), []
        x, state = step_blocks(self.blocks, x, self._state[:own_count], ctx)
        self._state = state + tail
        self._to_next(x)
        return self._next_logits(x)

    def _run(self, rows: ForwardBatch, state: list[State] | None) -> tuple[Tensor, list[State]]:
        """Run this rank's blocks on x [b, s, d] from the embedding or the previous stage."""
        ctx = Context(rows.mask, backend=self.backend, inputs=inputs_of(self.mixers, rows.inputs))
        inner, own_count = self.model.model, len(self.blocks)
        if self.first:
            x, tail = embed(inner.embed_tokens, inner.embed_tokens(rows.tokens), ctx, state)
        else:
            x, tail = self._from_previous((*rows.tokens.shape, self.config.hidden_size)), []
        x, after = run_blocks(self.blocks, x, ctx, None if state is None else state[:own_count])
        self._to_next(x)
        return x, [] if after is None else after + tail

    def _logits(self, x: Tensor) -> Tensor:
        """x [m, d] after the final norm -> logits [m, n] of the true vocabulary, in fp32 (fp64 for an fp64 model)."""
        local = in_accumulation_dtype(self.model.lm_head(x))
        if self.mesh.tp_group is not None:
            shards = [torch.empty_like(local) for _ in range(self.mesh.tp)]
            dist.all_gather(shards, local.contiguous(), group=self.mesh.tp_group)
            local = torch.cat(shards, -1)
        return local[:, : self.vocab_size]

    def _next_logits(self, x: Tensor) -> Tensor:
        if self.last:
            return self._from_last(self._logits(self.model.model.final_norm(x)))
        return self._from_last(torch.empty(len(x), self.vocab_size, dtype=sum_dtype(x.dtype), device=self.device))

    # communication

    def _rank(self, pp_rank: int, tp_rank: int) -> int:
        return rank_of(pp_rank, self.mesh.dp_rank, tp_rank, dp=self.mesh.dp, tp=self.mesh.tp)

    def _from_last(self, value: Tensor) -> Tensor:
        """Broadcast the last stage's value to all stages."""
        if self.mesh.pp_group is not None:
            value = value.contiguous()
            dist.broadcast(value, self._rank(self.mesh.pp - 1, self.mesh.tp_rank), group=self.mesh.pp_group)
        return value

    def _to_next(self, x: Tensor) -> None:
        if not self.last:
            target = self._rank(self.mesh.pp_rank + 1, self.mesh.tp_rank)
            dist.send(torch.tensor(_DTYPES.index(x.dtype), device=self.device), target)
            dist.send(x.contiguous(), target)

    def _from_previous(self, shape: Sequence[int]) -> Tensor:
        source = self._rank(self.mesh.pp_rank - 1, self.mesh.tp_rank)
        kind = torch.zeros((), dtype=torch.long, device=self.device)
        dist.recv(kind, source)
        x = torch.empty(*shape, dtype=_DTYPES[int(kind)], device=self.device)
        dist.recv(x, source)
        return x

    def _share(self, value: Tensor) -> Tensor:
        """Broadcast the leading rank's tensor to all ranks of the replica."""
        if self.mesh.tp_group is not None and self.first:
            dist.broadcast(value, self._rank(0, 0), group=self.mesh.tp_group)
        if self.mesh.pp_group is not None:
            dist.broadcast(value, self._rank(0, self.mesh.tp_rank), group=self.mesh.pp_group)
        return value

    def _header(self, numbers: Sequence[int]) -> list[int]:
        line = torch.zeros(5 + len(self.input_names), dtype=torch.long, device=self.device)
        line[: len(numbers)] = torch.tensor(numbers)
        return self._share(line).tolist()

    def _announce(
        self, kind: int, rows: ForwardBatch, places: Tensor | None = None, targets: Tensor | None = None
    ) -> tuple[ForwardBatch, Tensor, Tensor]:
        """Send the inputs of a pass to the other ranks; returns them on this rank's device."""
        rows = rows.to(self.device)
        none = torch.zeros(0, 3, dtype=torch.long)
        table = none if places is None or targets is None else torch.cat([places, targets[:, None]], 1)
        table = table.to(self.device)
        if self.mesh.tp * self.mesh.pp > 1:
            inputs = [rows.inputs.get(name) for name in self.input_names]
            self._header([kind, *rows.tokens.shape, int(rows.mask is not None), len(table), *map(_encoded, inputs)])
            for value in (rows.tokens, rows.mask, *inputs, table):
                if isinstance(value, Tensor):
                    self._share(value.to(torch.long).contiguous())
        return rows, table[:, :2], table[:, 2]

    def _receive(self) -> tuple[int, ForwardBatch, Tensor, Tensor]:
        kind, b, s, masked, m, *encoded = self._header([])
        if kind == _STOP:
            return kind, ForwardBatch(torch.zeros(0, 0)), torch.zeros(0, 2), torch.zeros(0)

        def get(*shape: int) -> Tensor:
            return self._share(torch.zeros(*shape, dtype=torch.long, device=self.device))

        tokens = get(b, s)
        mask = get(b, s) if masked else None
        numbers = {_TENSOR: lambda: get(b, s), _NOTHING: lambda: None}
        inputs = {name: numbers.get(n, lambda n=n: n)() for name, n in zip(self.input_names, encoded, strict=True)}
        table = get(m, 3)
        return kind, ForwardBatch(tokens, mask, inputs), table[:, :2], table[:, 2]


_NOTHING, _TENSOR = -1, -2


def _encoded(value: Tensor | int | None) -> int:
    """Encode an input as a number: its value, or a code for None, or a code for a tensor that follows."""
    return _TENSOR if isinstance(value, Tensor) else _NOTHING if value is None else int(value)


def open_forward(
    checkpoint: Path,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> tuple[Forward, Manifest]:
    """Load this rank's shard of a `global_step<N>` folder of any mesh; no rank reads more than its shard.

    Args:
        checkpoint: the folder.
        mesh: mesh of the evaluation.
        dtype: dtype of the weights; None: as stored.
        device: device of the weights.
        backend: see `Context`.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the model cannot be sharded over the mesh.
    """
    device, manifest = torch.device(device), read_manifest(checkpoint)
    config = model_config_of(manifest, str(checkpoint))
    if mesh.pp > config.num_layers:
        raise ConfigError(f"{config.num_layers} layers cannot fill {mesh.pp} pipeline stages", hint="lower pipe_parallel_size")
    check_tensor_parallel(config, mesh.tp)
    specs = param_specs(config)
    with torch.device("meta"):
        model = build_model(config)
    shard_model(model, specs, mesh)
    names = _own_names(config, specs, mesh)
    place = MeshPosition(mesh.pp_rank, mesh.tp_rank)
    with CheckpointReader(checkpoint, manifest) as source:
        missing = names - set(manifest.weights)
        if missing:
            raise CheckpointError(f"the checkpoint has no '{min(missing)}'", where=str(checkpoint))
        requests = (source.weight_request(name, local_slice(specs[name], mesh), place) for name in sorted(names))
        weights = dict(zip(sorted(names), source.tensors(requests), strict=True))
    state = {name: torch.nn.Parameter(t.to(device, dtype or t.dtype), requires_grad=False) for name, t in weights.items()}
    if config.tie_embeddings and _EMBEDDING in state:
        state["lm_head.weight"] = state[_EMBEDDING]
    model.load_state_dict(state, strict=False, assign=True)
    size = (manifest.facts.get("tokenizer") or {}).get("vocab_size")
    return Forward(model.eval(), mesh, size, device, backend), manifest


def _own_names(config: ModelConfig, specs: Mapping[str, ParamSpec], mesh: Mesh) -> set[str]:
    """Logical names of the parameters that this rank runs."""
    ranks = stage_ranks((spec.stage for spec in specs.values()), config.num_layers, mesh.pp)
    names = {name for name, spec in specs.items() if ranks[spec.stage] == mesh.pp_rank}
    return names | {_EMBEDDING} if config.tie_embeddings and mesh.pp_rank == mesh.pp - 1 else names
