"""Splits one step of a server's batch into decode rows (one new token and a state) and prefill rows.

A server concatenates the new tokens of all sequences. Decode rows go through `Layer.step` together. Prefill rows (prompts,
chunks of prompts, a prompt of one token) go through `Layer.forward`: rows of similar length form one pass, padded on the right,
and padding affects neither outputs nor states. A row that has not read any token starts from an empty state, whatever its page
contains.
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
    """Prefill rows that are processed together.

    Attributes:
        tokens: [b, s], indices into the flat batch; arbitrary where `mask` is False.
        mask: [b, s], False for padding; None if all rows have the same length.
        slots: [b], page of each row.
        fresh: [b], True for rows that have not read any token.
    """

    tokens: Tensor
    mask: Tensor | None
    slots: Tensor
    fresh: Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a batch.

    Attributes:
        steps: [n], indices of the decode rows' tokens in the flat batch.
        step_slots: [n], their pages.
        passes: the prefill rows.
    """

    steps: Tensor
    step_slots: Tensor
    passes: tuple[Pass, ...]


def arrange(starts: Sequence[int], seen: Sequence[int], slots: Tensor) -> Rows:
    """Split the rows of a batch into steps and passes.

    Args:
        starts: [rows + 1], index of each row's first new token in the flat batch; the last entry is its length.
        seen: [rows], number of tokens that each row's state has read.
        slots: [rows], the page of each row, on the device of the batch.
    """
    lengths = [end - begin for begin, end in pairwise(starts)]
    steps = [row for row, n in enumerate(lengths) if n == 1 and seen[row]]
    prefill = sorted((row for row, n in enumerate(lengths) if n > 1 or (n and not seen[row])), key=lambda r: -lengths[r])
    passes = [_as_pass(rows, starts, lengths, seen, slots) for rows in _similar_lengths(prefill, lengths)]
    step_tokens = torch.tensor([starts[row] for row in steps], dtype=torch.long, device=slots.device)
    return Rows(step_tokens, slots[torch.tensor(steps, dtype=torch.long, device=slots.device)], tuple(passes))


def _similar_lengths(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Groups of rows (sorted by descending length) whose shortest row has at least half of the longest row's tokens."""
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
    """Run all rows of a batch through one mixer and update their states in the pages.

    Args:
        mixer: a mixer whose state has a fixed size.
        x: [n, d], the flat batch; tokens that belong to no row get outputs of 0.
        pages: name of a state tensor -> [pages, ...]; overwritten in the rows' slots.
        rows: from `arrange`.
        ctx: context of the pass; its mask is ignored.

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
    """Decode one token per row x [b, d]; in place in the pages if the mixer supports it."""
    if mixer.steps_by_slot:
        return mixer.step(x, pages, replace(ctx, mask=None, in_place=True, slots=slots))[0]
    out, after = mixer.step(x, {name: page[slots] for name, page in pages.items()}, replace(ctx, mask=None))
    _store(pages, slots, after)
    return out


def _state(mixer: Layer, pages: State, part: Pass, x: Tensor) -> State:
    """States of the rows of a pass: from their pages, empty for fresh rows."""
    empty = mixer.init_state(1, x.dtype, x.device)
    state = {}
    for name, page in pages.items():
        old = page[part.slots]
        state[name] = torch.where(part.fresh.view(-1, *[1] * (old.dim() - 1)), empty[name].to(old.dtype), old)
    return state


def _store(pages: State, slots: Tensor, state: State) -> None:
    for name, page in pages.items():
        page[slots] = state[name].to(page.dtype)
