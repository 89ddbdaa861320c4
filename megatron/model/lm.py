"""The language model on one device: embedding, blocks, final norm, output projection.

Module names are those of the released MetaLA models, so that a parameter has the same name in training, in a checkpoint and
in an exported folder of our classes (transformers' own classes: `interop/hf_models.py`). `model/stages.py` lists the same
modules in order, for pipelines.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron.layers.base import Context, Layer, State
from megatron.model.block import Block
from megatron.model.config import ModelConfig
from megatron.model.embed import Embedding, Head
from megatron.model.norm import Norm
from megatron.ops.modules import has_hooks


def embed(embedding: Embedding, x: Tensor, ctx: Context, state: list[State] | None) -> tuple[Tensor, list[State]]:
    """Token embeddings `x [b, s, d]` with positions and norm, and the embedding's new state, last in the list of states."""
    if embedding.positions is None or state is None:
        return embedding.finish(x, ctx)[0], []
    x, after = embedding.finish(x, ctx, state[-1])
    return x, [] if after is None else [after]


def empty_states(
    embedding: Embedding, blocks: Iterable[Block], batch: int, dtype: torch.dtype, device: torch.device | str
) -> list[State]:
    """One state per block, then the embedding's if it has one."""
    return [b.token_mixer.init_state(batch, dtype, device) for b in blocks] + embedding.init_state(batch, device)


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, ctx: Context, state: list[State] | None
) -> tuple[Tensor, list[State] | None]:
    """All residual blocks over `x [b, s, d]`; with `state`, one per block, it continues from it and returns the new one."""
    new: list[State] = []
    chain: list[nn.Module] = list(blocks)
    for i, block in enumerate(chain):
        # hooks and wrappers of a block expect a single tensor, which they may replace
        in_parts = i + 1 < len(chain) and all(isinstance(one, Block) and not has_hooks(one) for one in chain[i : i + 2])
        before = None if state is None else state[i]
        x, after = block(x, ctx, before, True) if in_parts else block(x, ctx, before)
        if after is not None:
            new.append(after)
    return x, None if state is None else new


def step_blocks(blocks: Iterable[Block], x: Tensor, state: list[State], ctx: Context) -> tuple[Tensor, list[State]]:
    """One decode step through all blocks: `x [b, d]` -> `[b, d]` and the new state."""
    new, chain = [], list(blocks)
    for i, (block, before) in enumerate(zip(chain, state, strict=True)):
        x, after = block.step(x, before, ctx, i + 1 < len(chain))
        new.append(after)
    return x, new


class Backbone(nn.Module):
    """Everything below the output projection."""

    def __init__(self, config: ModelConfig, mixers: list[Layer]) -> None:
        super().__init__()
        d = config.hidden_size
        norm = Norm(config.norm, d, config.norm_eps) if config.embedding_norm else None
        scale = d**0.5 if config.embedding_scale else 1.0
        self.embed_tokens = Embedding(config.vocab_size, d, scale, config.learned_positions, norm)
        self.layers = nn.ModuleList(Block(config, mixer) for mixer in mixers)
        self.final_norm = Norm(config.norm, d, config.norm_eps)

    def blocks(self) -> list[Block]:
        """The residual blocks, typed as `Block`."""
        return [block for block in self.layers if isinstance(block, Block)]


class LanguageModel(nn.Module):
    """`tokens [b, s]` -> `logits [b, s, n]`.

    Args:
        config: the architecture.
        mixers: one token mixer per block, built by `model/build.py` (training) or by the exported folder itself.
    """

    def __init__(self, config: ModelConfig, mixers: list[Layer]) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config, mixers)
        tied = self.model.embed_tokens if config.tie_embeddings else None
        self.lm_head = Head(config.vocab_size, config.hidden_size, tied)

    def forward(
        self, tokens: Tensor, ctx: Context | None = None, state: list[State] | None = None
    ) -> tuple[Tensor, list[State] | None]:
        """Logits of every position; with `state` the pass continues from it and the new one is returned."""
        ctx = ctx or Context()
        x, tail = embed(self.model.embed_tokens, self.model.embed_tokens(tokens), ctx, state)
        x, state = run_blocks(self.model.layers, x, ctx, state)
        return self.lm_head(self.model.final_norm(x, backend=ctx.backend)), None if state is None else state + tail

    def step(self, tokens: Tensor, state: list[State], ctx: Context | None = None) -> tuple[Tensor, list[State]]:
        """One decode step: `tokens [b]` -> `logits [b, n]` and the new state."""
        ctx = ctx or Context()
        x, tail = embed(self.model.embed_tokens, self.model.embed_tokens(tokens.unsqueeze(1)), Context(), state)
        x, state = step_blocks(self.model.blocks(), x.squeeze(1), state[: len(state) - len(tail)], ctx)
        return self.lm_head(self.model.final_norm(x, backend=ctx.backend)), state + tail

    def init_state(self, batch: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> list[State]:
        """Empty states of all layers, then the embedding's if it has one; dtype and device default to the embedding's."""
        weight = self.model.embed_tokens.weight
        return empty_states(self.model.embed_tokens, self.model.blocks(), batch, dtype or weight.dtype, device or weight.device)
