"""One step of a server's batch as the mixers want it: rows that go on by a token, and rows that read several tokens.

A server puts the new tokens of all sequences one behind the other. Rows with one new token and a state go through
`Layer.step` together. Others (prompts, pieces of prompts, a text of one token) go through `Layer.forward`, rows of similar
length in one pass with padding on the right, which mixers leave out of outputs and states. What a page held before does not
count for a row that has read nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from megatron.layers.base import Context, Layer, State


@dataclass(frozen=True)
class Pass:
    """Rows of several tokens.

    Attributes:
        tokens: [b, s], places in the flat batch; anything where `mask` is False.
        mask: [b, s], False for padding; None where all rows are equally long.
        slots: [b], pages of the rows.
        fresh: [b], True for rows that have read nothing.
    """

    tokens: Tensor
    mask: Tensor | None
    slots: Tensor
    fresh: Tensor


@dataclass(frozen=True)
class Rows:
    """A batch.

    Attributes:
        steps: [n], places in the flat batch of the tokens that are steps.
        step_slots: [n], their pages.
        passes: all other rows.
    """

    steps: Tensor
    step_slots: Tensor
    passes: tuple[Pass, ...]


def arrange(starts: Sequence[int], seen: Sequence[int], slots: Tensor) -> Rows:
    """Sort the rows of a batch into steps and passes.

    Args:
        starts: [rows + 1], where each row's new tokens begin in the flat batch; the last is its length.
        seen: [rows], tokens that each row's state has read.
        slots: [rows], the page of each row, on the device of the batch.
    """
    lengths = [end - begin for begin, end in pairwise(starts)]
    steps = [row for row, n in enumerate(lengths) if n == 1 and seen[row]]
    several = sorted((row for row, n in enumerate(lengths) if n > 1 or (n and not seen[row])), key=lambda r: -lengths[r])
    passes = [_as_pass(rows, starts, lengths, seen, slots) for rows in _alike(several, lengths)]
    own = torch.tensor([starts[row] for row in steps], dtype=torch.long, device=slots.device)
    return Rows(own, slots[torch.tensor(steps, dtype=torch.long, device=slots.device)], tuple(passes))


def _alike(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows, the longest first, in groups whose shortest has at least half of the longest's tokens."""
    group: list[int] = []
    for row in rows:
        if group and 2 * lengths[row] < lengths[group[0]]:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _as_pass(rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], seen: Sequence[int], slots: Tensor) -> Pass:
    device, longest = slots.device, lengths[rows[0]]
    begins, counts, places, fresh = (
        torch.tensor(values, device=device)
        for values in ([starts[r] for r in rows], [lengths[r] for r in rows], list(rows), [not seen[r] for r in rows])
    )
    place = torch.arange(longest, device=device)
    mask = place < counts[:, None]
    tokens = begins[:, None] + torch.where(mask, place, 0)
    return Pass(tokens, None if lengths[rows[-1]] == longest else mask, slots[places], fresh)


def run_batch(mixer: Layer, x: Tensor, pages: State, rows: Rows, ctx: Context) -> Tensor:
    """All rows of a batch through one mixer; their states in the pages go on.

    Args:
        mixer: of a state of fixed size.
        x: [n, d], the flat batch, which may have more tokens than the rows (their outputs are 0).
        pages: the state by name, [pages, ...] each; overwritten in the rows' slots.
        rows: from `arrange`.
        ctx: of the pass; its mask is ignored.

    Returns:
        y [n, d].
    """
    y = torch.zeros_like(x)
    if len(rows.steps):
        y[rows.steps] = _steps(mixer, x[rows.steps], pages, rows.step_slots, ctx).to(y.dtype)
    for part in rows.passes:
        inner = replace(ctx, mask=part.mask)
        out, after = mixer(x[part.tokens], inner, _state(mixer, pages, part, x))
        assert after is not None
        _store(pages, part.slots, after)
        if part.mask is None:
            y[part.tokens] = out.to(y.dtype)
        else:
            y[part.tokens[part.mask]] = out[part.mask].to(y.dtype)
    return y


def _steps(mixer: Layer, x: Tensor, pages: State, slots: Tensor, ctx: Context) -> Tensor:
    """Rows x [b, d] by one token; in the pages themselves where the mixer can."""
    if mixer.steps_by_slot:
        return mixer.step(x, pages, replace(ctx, mask=None, in_place=True, slots=slots))[0]
    out, after = mixer.step(x, {name: page[slots] for name, page in pages.items()}, replace(ctx, mask=None))
    _store(pages, slots, after)
    return out


def _state(mixer: Layer, pages: State, part: Pass, x: Tensor) -> State:
    """What the rows of a pass have read."""
    empty = mixer.init_state(1, x.dtype, x.device)
    state = {}
    for name, page in pages.items():
        old = page[part.slots]
        state[name] = torch.where(part.fresh.view(-1, *[1] * (old.dim() - 1)), empty[name].to(old.dtype), old)
    return state


def _store(pages: State, slots: Tensor, state: State) -> None:
    for name, page in pages.items():
        page[slots] = state[name].to(page.dtype)
