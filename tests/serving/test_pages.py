"""Layout of states in pages: nothing overlaps, little is wasted, and layers with little state share a page."""

from __future__ import annotations

import pytest
import torch

from megatron.serving.pages import ALIGNMENT, Page, lay_out

STATES = {
    0: {"conv": torch.zeros(1, 3, 10)},
    1: {"recurrent": torch.zeros(1, 4, 8, 16), "conv": torch.zeros(1, 3, 64, dtype=torch.bfloat16)},
    2: {"conv": torch.zeros(1, 3, 10)},
    3: {"recurrent": torch.zeros(1, 4, 8, 8), "tokens": torch.zeros(1, dtype=torch.long)},
}


def layers(page: Page) -> list[int]:
    return sorted({cell.layer for cell in page.cells})


def test_together_one_page_holds_all_and_wastes_alignment_only() -> None:
    (page,) = lay_out(STATES, together=True)
    bare = sum(t.numel() * t.element_size() for state in STATES.values() for t in state.values())
    count = sum(len(state) for state in STATES.values())
    assert layers(page) == [0, 1, 2, 3]
    assert bare <= page.nbytes < bare + count * ALIGNMENT


def test_apart_pages_are_as_wide_as_the_widest_layer_and_small_layers_share_one() -> None:
    pages = lay_out(STATES, together=False)
    assert [layers(page) for page in pages] == [[1], [0, 2, 3]]
    assert {page.nbytes for page in pages} == {4 * 8 * 16 * 4 + 3 * 64 * 2}


@pytest.mark.parametrize("together", [True, False])
def test_what_is_written_into_one_state_is_read_from_it_and_from_no_other(together: bool) -> None:
    written, raws = {}, []
    for page in lay_out(STATES, together):
        raw = torch.randint(-128, 127, (5, page.nbytes + 64), dtype=torch.int8)  # a server's page may be wider
        raws.append(raw)
        for layer, state in page.views(raw).items():
            for name, view in state.items():
                assert view.shape == (5, *STATES[layer][name].shape[1:]) and view.dtype == STATES[layer][name].dtype
                value = torch.arange(view[0].numel() * 5).reshape(view.shape).to(view.dtype) + layer
                view.copy_(value)
                written[layer, name] = (view, value)
    assert len(written) == 6
    assert all(torch.equal(view, value) for view, value in written.values())


def test_a_state_that_has_no_size_yet_is_refused() -> None:
    with pytest.raises(ValueError, match="grows with the text"):
        lay_out({2: {"keys": torch.zeros(1, 0, 2, 8)}}, together=True)
