"""A server's batches through every mixer of a fixed state give what one pass over each text gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.layers.base import Context, Layer
from megatron.registry import layer_names
from megatron.serving.batch import arrange, run_batch
from megatron.serving.pages import lay_out
from tests.layers.test_contract import TOLERANCE, D, make

FIXED = [n for n in layer_names() if all(t.numel() for t in make(n).init_state(1, torch.float64, "meta").values())]
"""All but attention over a whole text; a window is a state beside two-way layers."""


def test_rows_of_a_batch_are_sorted_into_steps_and_passes() -> None:
    # a step, a new text of one token, a piece of 8 tokens, a row without tokens, a new text of 5, one of 2
    rows = arrange([0, 1, 2, 10, 10, 15, 17], [9, 0, 4, 7, 0, 0], torch.tensor([7, 3, 9, 1, 4, 5]))
    assert rows.steps.tolist() == [0] and rows.step_slots.tolist() == [7]
    assert [p.slots.tolist() for p in rows.passes] == [[9, 4], [5, 3]]
    long, short = rows.passes
    assert long.fresh.tolist() == [False, True] and short.fresh.tolist() == [True, True]
    assert long.mask is not None and long.mask.sum(1).tolist() == [8, 5]
    assert long.tokens[0].tolist() == list(range(2, 10)) and long.tokens[1, :5].tolist() == list(range(10, 15))


def test_rows_of_one_length_have_no_mask() -> None:
    (only,) = arrange([0, 4, 8], [0, 6], torch.tensor([1, 2])).passes
    assert only.mask is None


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("pieces", [[(7,), (1, 3, 2, 1)], [(1, 1, 1), (9,)], [(5, 1, 1), (5, 2), (1, 6)]], ids=str)
def test_texts_in_pieces_and_steps_side_by_side_equal_whole_passes(name: str, pieces: list[tuple[int, ...]]) -> None:
    """Pages begin with other sequences' states; a page is used by one text after the other."""
    mixer, g = make(name), torch.Generator().manual_seed(2)
    texts = [torch.randn(1, sum(lengths), D, generator=g, dtype=torch.float64) for lengths in pieces]
    (page,) = lay_out({0: mixer.init_state(1, torch.float64, "meta")}, together=True)
    raw = torch.full((len(pieces) + 2, page.nbytes), -1, dtype=torch.int8)  # not a number, read as fp64
    slots = torch.arange(len(pieces)).flip(0) + 2
    with torch.no_grad():
        for _ in range(2):  # the second time over what the first has left in the pages
            assert_equal_whole_passes(mixer, texts, pieces, page.views(raw)[0], slots)


def assert_equal_whole_passes(
    mixer: Layer, texts: list[Tensor], pieces: list[tuple[int, ...]], pages: dict[str, Tensor], slots: Tensor
) -> None:
    wanted = [mixer(text, Context())[0][0] for text in texts]
    seen = [0] * len(texts)
    for turn in range(max(map(len, pieces))):
        live = [row for row, lengths in enumerate(pieces) if turn < len(lengths)]
        parts = [texts[row][0, seen[row] : seen[row] + pieces[row][turn]] for row in live]
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part))
        flat = torch.cat([*parts, torch.ones(2, D, dtype=torch.float64)])  # a server may add tokens of nobody
        y = run_batch(mixer, flat, pages, arrange(starts, [seen[r] for r in live], slots[live]), Context())
        for row, begin, part in zip(live, starts, parts, strict=False):
            expected = wanted[row][seen[row] : seen[row] + len(part)]
            assert (y[begin : begin + len(part)] - expected).abs().max() <= TOLERANCE
            seen[row] += len(part)
        assert not y[starts[-1] :].any()
