"""Generation: one pass over the prompts, then the decode loop, one step per token with the recurrent state.

`decode` is the loop, `sample_tokens` samples the next token from logits; the decode step as a CUDA graph is in
`generation/decode.py`.

The state of a linear-attention model has one size however long the text is, so a step costs the same at token 10 and at
token 10,000. Prompts of different lengths share a batch by padding on the left, which the mixers treat as an empty history:
a row of a batch gives exactly the text of the same prompt alone. Each row has its own random generator, so a sampled text does
not depend on the other rows either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron.errors import ConfigError
from megatron.generation.decode import TokenStep
from megatron.generation.prompts import MODES, fill_prompt, filler_mask, left_pad
from megatron.layers.base import Context, State, inputs_of
from megatron.model.lm import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; greedy when temperature, top_k and top_p are all 0 (as in GPT-NeoX).

    Attributes:
        temperature: divides the logits when > 0.
        top_k: only the k likeliest tokens, 0 = off.
        top_p: the smallest set of tokens that holds this probability, 0 = off.
        maximum_tokens: new tokens per prompt.
        max_length: prompt and new tokens together, None = no limit.
        stop_tokens: end a text besides eod; neither they nor eod are part of it.
        seed: row i draws from seed + i.
        recompute: run the complete text again for each token instead of a step (slow; a check on the state).
        return_logits: return the logits that each token was chosen from.
        prompt_mode: how prompts are prepared for a prefix (JRT) model, see `generation/prompts.py`.
        prefix_length: length of that prefix; 0 is the model's own.
        backend: path of the operators, see `ops/dispatch.py`.
        cuda_graph: on a GPU record the token step once and replay it, see `generation/decode.py`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    maximum_tokens: int = 64
    max_length: int | None = None
    stop_tokens: tuple[int, ...] = ()
    seed: int = 1234
    recompute: bool = False
    return_logits: bool = False
    prompt_mode: str = "plain"
    prefix_length: int = 0
    backend: str = "auto"
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("maximum_tokens", self.maximum_tokens >= 1, "at least 1"),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}", why=f"it must be {rule}")
        if self.prompt_mode not in MODES or (self.prompt_mode != "plain" and not self.prefix_length):
            raise ConfigError(
                f"prompt_mode '{self.prompt_mode}' with prefix_length {self.prefix_length}",
                why="it is plain, or left_pad or read_twice with the length to fill up to",
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always selected."""
        return not (self.temperature or self.top_k or self.top_p)


@dataclass
class Generated:
    """Result of one prompt.

    Attributes:
        tokens: new ones, without prompt and eod.
        finished: the text ended by itself.
        message: why it did not.
        logits: [n] per token, with `return_logits`.
    """

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    message: str | None = None
    logits: list[Tensor] = field(default_factory=list)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [b, n] (fp32) after temperature, then top-k, then top-p; excluded tokens become -inf."""
    if sampling.temperature:
        logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # a token stays while the mass before it is below top_p, so the likeliest one always stays
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits


def sample_tokens(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row: logits [b, n] -> [b] int64, greedy or drawn with the row's own generator."""
    logits = logits.float()
    if sampling.greedy:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, sampling).softmax(-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)


class NextLogits(Protocol):
    """A model that is read token by token: one batch of prompts, then one token per row at a time."""

    def prefill(self) -> Tensor:
        """Logits [b, n] after the prompts."""

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits [b, n] after one more token [b] per row."""


def decode(
    model: NextLogits,
    sampling: Sampling,
    first_row: int,
    live: Sequence[bool],
    accept: Callable[[int, int, Tensor], bool],
    vocab_size: int | None = None,
) -> None:
    """The decode loop: sample token after token until every row has ended.

    Args:
        model: one batch of prompts.
        sampling: how a token is chosen; row i draws with the seed `sampling.seed + first_row + i`.
        first_row: number of the first row among all prompts of the run.
        live: [b], whether a row generates tokens at all.
        accept: called with (row, token, the logits [n] it was chosen from); false ends the row.
        vocab_size: ids from this one on are never chosen; None for all that the model has.
    """
    going = list(live)
    generators = [torch.Generator().manual_seed(sampling.seed + first_row + row) for row in range(len(going))]
    logits = model.prefill() if any(going) else None
    while logits is not None:
        logits = logits[:, :vocab_size]
        chosen = sample_tokens(logits, sampling, generators)
        for row, token in enumerate(chosen.tolist()):
            if going[row]:
                going[row] = accept(row, token, logits[row])
        logits = model.advance(chosen) if any(going) else None


class _Prompts:
    """A `NextLogits` of prompts before a model on this device, by state or (recompute) by running everything again."""

    def __init__(
        self, model: LanguageModel, tokens: Tensor, mask: Tensor | None, hidden: Tensor | None, sampling: Sampling
    ) -> None:
        self.model, self.tokens, self.mask, self.hidden, self.sampling = model, tokens, mask, hidden, sampling
        # the prompt is the prefix, also when the text is run again with more tokens after it
        self.prefix = min(sampling.prefix_length, tokens.shape[1]) or None
        self.mixers = [block.token_mixer for block in model.model.blocks()]
        self.state: list[State] | None = None
        self.fast: TokenStep | None = None
        if not sampling.recompute:
            self.state = model.init_state(tokens.shape[0])

    def prefill(self) -> Tensor:
        """Logits [b, n] after the prompts."""
        inputs = inputs_of(self.mixers, {"prefix_length": self.prefix, "prefix_mask": self.hidden})
        ctx = Context(self.mask, backend=self.sampling.backend, inputs=inputs)
        logits, self.state = self.model(self.tokens, ctx, self.state)
        return logits[:, -1]

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits [b, n] after one more token [b] per row."""
        if self.state is not None:
            if tokens.is_cuda and self.sampling.cuda_graph:
                self.fast = self.fast or TokenStep(self.model, self.state, self.sampling.backend)
                return self.fast(tokens)
            logits, self.state = self.model.step(tokens, self.state, Context(backend=self.sampling.backend))
            return logits
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        if self.hidden is not None:
            self.hidden = torch.cat([self.hidden, self.hidden.new_ones(len(tokens), 1)], dim=1)
        return self.prefill()


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eod: int,
    vocab_size: int | None = None,
    first_row: int = 0,
) -> list[Generated]:
    """Continue each prompt (token ids; an empty one starts from `eod`, the boundary between documents).

    Args:
        model: on the device where it runs.
        prompts: token ids.
        sampling: how tokens are chosen.
        eod: ends a text.
        vocab_size: size of the vocabulary without padding; padding is never chosen.
        first_row: number of the first prompt among all of the run, so that seeds do not depend on how prompts are batched.

    Returns:
        One `Generated` per prompt, in order.
    """
    if not prompts:
        return []
    starts = [list(p) or [eod] for p in prompts]
    results = [Generated() for _ in starts]
    budgets = [_budget(len(start), sampling, result) for start, result in zip(starts, results, strict=True)]
    device = next(model.parameters()).device
    filled = [fill_prompt(start, sampling.prompt_mode, sampling.prefix_length) for start in starts]
    tokens, mask = left_pad([row for row, _ in filled], eod, device)
    hidden = filler_mask([count for _, count in filled], [len(row) for row, _ in filled], device)
    ends = {eod, *sampling.stop_tokens}

    def accept(row: int, token: int, logits: Tensor) -> bool:
        return _take(results[row], token, logits, ends, budgets[row], sampling)

    batch = _Prompts(model, tokens, mask, hidden, sampling)
    decode(batch, sampling, first_row, [budget > 0 for budget in budgets], accept, vocab_size)
    return results


def _budget(prompt: int, sampling: Sampling, result: Generated) -> int:
    """New tokens that a prompt of this length may have; sets the message when that is less than `maximum_tokens`."""
    if sampling.max_length is None or prompt + sampling.maximum_tokens <= sampling.max_length:
        return sampling.maximum_tokens
    room = max(0, sampling.max_length - prompt)
    result.message = f"the prompt has {prompt} tokens: room for {room} of {sampling.maximum_tokens} new ones"
    result.message += f" within the length of {sampling.max_length}"
    return room


def _take(result: Generated, token: int, logits: Tensor, ends: set[int], budget: int, sampling: Sampling) -> bool:
    """Append one sampled token to a row; False when the row has ended."""
    if token in ends:
        result.finished, result.message = True, None
        return False
    result.tokens.append(token)
    if sampling.return_logits:
        result.logits.append(logits.float().cpu())
    return len(result.tokens) < budget
