"""The model as a flat list of stages, for pipelines: the same modules in order.

Stages pass a tuple of tensors: `(x, *inputs[, segment_ids])`. The first stage gets token ids in place of x, the last returns
logits. `inputs` are additional inputs of some mixers (`Layer.Inputs`): tensors [b, s], or numbers as tensors [1]. Which of them
the batches of a run contain is fixed when the stages are built. Indices are GPT-NeoX's, which also number the files of a
checkpoint.

Under context parallelism x and the inputs are those of this rank's shard, and `segment_ids` those of the whole row: mixers need
the document boundaries of the other shards. A stage takes its own part of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron.errors import ConfigError, DataError
from megatron.layers.base import Context, Layer, LayerInputs, input_names, inputs_of
from megatron.model.block import Block
from megatron.model.embed import Embedding, Head
from megatron.model.lm import LanguageModel
from megatron.model.norm import Norm
from megatron.parallel.context_shards import ContextShards

Activations = tuple[Tensor, ...]


def input_tensors(given: Mapping[str, Tensor | int], names: Sequence[str]) -> Activations:
    """The mixers' inputs of a micro batch as tensors, in the order of `names`.

    Raises:
        DataError: the inputs of the batch are not those in `names`.
    """
    if set(given) != set(names):
        raise DataError(f"a batch brings the inputs {sorted(given)}, the run expects {sorted(names)}")
    values = [given[name] for name in names]
    return tuple(v.contiguous() if isinstance(v, Tensor) else torch.tensor([v]) for v in values)


class StageModule(nn.Module):
    """One stage; `prefix` + local parameter name = logical name."""

    prefix = ""

    def __init__(self, body: nn.Module, prefix: str) -> None:
        super().__init__()
        self.body = body
        self.prefix = prefix

    @property
    def logical(self) -> dict[str, str]:
        """Parameter name inside this stage module -> logical name."""
        return {name: f"{self.prefix}.{name.removeprefix('body.')}" for name, _ in self.named_parameters()}


def _context(activations: Activations, ids_at: int, shards: ContextShards | None, backend: str = "auto") -> Context:
    """The context of a pass over `activations`, without inputs of single mixers."""
    ids = activations[ids_at] if len(activations) > ids_at else None
    if shards is None:
        return Context(segment_ids=ids, backend=backend)
    first: Any = activations[0]
    x: Tensor = first[0] if isinstance(first, tuple) else first  # in parts between two blocks, see `Block.forward`
    shard, local_ids = shards.of(x.shape[0], ids, x.device)
    return Context(segment_ids=local_ids, backend=backend, cp=shard)


class FirstStage(StageModule):
    """Embedding: `(tokens, ...)` -> `(x, ...)`."""

    def __init__(self, body: Embedding, prefix: str, inputs: Sequence[str] = (), shards: ContextShards | None = None) -> None:
        super().__init__(body, prefix)
        self.ids_at, self.shards = 1 + len(inputs), shards

    def forward(self, activations: Activations) -> Activations:
        """See the class."""
        assert isinstance(self.body, Embedding)
        ctx = _context(activations, self.ids_at, self.shards)
        return (self.body.finish(self.body(activations[0]), ctx)[0], *activations[1:])


class BlockStage(StageModule):
    """One residual block."""

    def __init__(
        self, body: Block, prefix: str, backend: str = "auto", inputs: Sequence[str] = (), shards: ContextShards | None = None
    ) -> None:
        super().__init__(body, prefix)
        self.backend, self.inputs, self.ids_at, self.shards = backend, tuple(inputs), 1 + len(inputs), shards

    def forward(self, activations: Activations, in_parts: bool = False) -> Activations:
        """`(x, ...)` -> the same; x as in `Block.forward`, a pair only between two blocks of a stage."""
        assert isinstance(self.body, Block)
        ctx = _context(activations, self.ids_at, self.shards, self.backend)
        ctx = replace(ctx, inputs=self._inputs(activations, self.body.token_mixer))
        x, _ = self.body(activations[0], ctx, None, in_parts)
        return (x, *activations[1:])

    def _inputs(self, activations: Activations, mixer: Layer) -> tuple[LayerInputs, ...]:
        """The inputs that this block's mixer declares, from those of the micro batch."""
        if not self.inputs:
            return ()
        own, given = input_names([mixer]), dict(zip(self.inputs, activations[1 : self.ids_at], strict=True))
        return inputs_of([mixer], {n: int(t) if t.dim() == 1 else t for n, t in given.items() if n in own})


class NormStage(StageModule):
    """Final norm: `(x, ...)` -> the same."""

    def __init__(self, body: Norm, prefix: str, backend: str = "auto") -> None:
        super().__init__(body, prefix)
        self.backend = backend

    def forward(self, activations: Activations) -> Activations:
        """See the class."""
        return (self.body(activations[0], backend=self.backend), *activations[1:])


class LastStage(StageModule):
    """Output projection: `(x, ...)` -> logits `[b, s, n]` of this rank's vocabulary rows.

    Without `logits` it returns the input of the projection `[b, s, d]`, for a loss that computes the logits itself
    (`model/linear_loss.py`).
    """

    def __init__(self, body: Head, prefix: str, logits: bool = True) -> None:
        super().__init__(body, prefix)
        self.logits = logits

    def forward(self, activations: Activations) -> Tensor:
        """See the class."""
        assert isinstance(self.body, Head)
        return self.body(activations[0]) if self.logits else self.body.projection_input(activations[0])


@dataclass(frozen=True)
class Stage:
    """A stage and its number.

    Attributes:
        index: GPT-NeoX's index of the stage.
        module: maps activations to activations.
    """

    index: int
    module: StageModule


def stages_of(
    model: LanguageModel,
    backend: str = "auto",
    logits: bool = True,
    inputs: Sequence[str] = (),
    shards: ContextShards | None = None,
) -> list[Stage]:
    """All stages of a model, in order.

    With a tied output projection the last stage's weight is the embedding's parameter.

    Args:
        model: the model.
        backend: path of the operators, see `ops/dispatch.py`.
        logits: as in `LastStage`.
        inputs: names of the mixers' inputs that every micro batch contains.
        shards: builds the context-parallel shards; None without context parallelism.

    Raises:
        ConfigError: no mixer of the model declares one of the inputs.
    """
    layers = model.config.num_layers
    unknown = set(inputs) - set(input_names(block.token_mixer for block in model.model.blocks()))
    if unknown:
        raise ConfigError(
            f"no mixer of this model reads '{min(unknown)}'", hint="a mixer declares what it reads as its `Inputs`"
        )
    stages = [Stage(0, FirstStage(model.model.embed_tokens, "model.embed_tokens", inputs, shards))]
    for i, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        stages.append(Stage(i + 2, BlockStage(block, f"model.layers.{i}", backend, inputs, shards)))
    stages.append(Stage(layers + 3, NormStage(model.model.final_norm, "model.final_norm", backend)))
    stages.append(Stage(layers + 4, LastStage(model.lm_head, "lm_head", logits)))
    return stages
