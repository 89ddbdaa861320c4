"""The model as a flat list of stages, for pipelines: the very same modules, one after the other.

What flows between stages is a tuple of tensors: `(x,)` or `(x, segment_ids)`; into the first go token ids in place of x, out
of the last come logits. Indices are GPT-NeoX's, which also number the files of a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from megatron.layers.base import Context
from megatron.model.block import Block
from megatron.model.embed import Embedding, Head
from megatron.model.lm import LanguageModel
from megatron.model.norm import Norm

Flow = tuple[Tensor, ...]


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


class FirstStage(StageModule):
    """Embedding: `(tokens[, segment_ids])` -> `(x[, segment_ids])`."""

    def forward(self, flow: Flow) -> Flow:
        """See the class."""
        assert isinstance(self.body, Embedding)
        ctx = Context(segment_ids=flow[1] if len(flow) > 1 else None)
        return (self.body.finish(self.body(flow[0]), ctx)[0], *flow[1:])


class BlockStage(StageModule):
    """One residual block."""

    def __init__(self, body: Block, prefix: str, backend: str = "auto") -> None:
        super().__init__(body, prefix)
        self.backend = backend

    def forward(self, flow: Flow) -> Flow:
        """`(x[, segment_ids])` -> the same."""
        ctx = Context(segment_ids=flow[1] if len(flow) > 1 else None, backend=self.backend)
        x, _ = self.body(flow[0], ctx)
        return (x, *flow[1:])


class NormStage(StageModule):
    """Final norm: `(x[, segment_ids])` -> the same."""

    def __init__(self, body: Norm, prefix: str, backend: str = "auto") -> None:
        super().__init__(body, prefix)
        self.backend = backend

    def forward(self, flow: Flow) -> Flow:
        """See the class."""
        return (self.body(flow[0], backend=self.backend), *flow[1:])


class LastStage(StageModule):
    """Output matrix: `(x[, segment_ids])` -> logits `[b, s, n]` of the vocabulary rows held here.

    Without `logits` it gives `[b, s, d]`, what the matrix is to multiply, to a loss that does so itself
    (`parallel/linear_loss.py`).
    """

    def __init__(self, body: Head, prefix: str, logits: bool = True) -> None:
        super().__init__(body, prefix)
        self.logits = logits

    def forward(self, flow: Flow) -> Tensor:
        """See the class."""
        assert isinstance(self.body, Head)
        return self.body(flow[0]) if self.logits else self.body.seen(flow[0])


@dataclass(frozen=True)
class Stage:
    """index: NeoX's number; module: maps flow to flow."""

    index: int
    module: StageModule


def stages_of(model: LanguageModel, backend: str = "auto", logits: bool = True) -> list[Stage]:
    """All stages of a model, in order; `logits` as in `LastStage`.

    With a tied output matrix the last stage's weight is the embedding's parameter.
    """
    layers = model.config.num_layers
    stages = [Stage(0, FirstStage(model.model.embed_tokens, "model.embed_tokens"))]
    for i, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        stages.append(Stage(i + 2, BlockStage(block, f"model.layers.{i}", backend)))
    stages.append(Stage(layers + 3, NormStage(model.model.final_norm, "model.final_norm", backend)))
    stages.append(Stage(layers + 4, LastStage(model.lm_head, "lm_head", logits)))
    return stages
