"""Places of tokens in rows and documents against counting them one by one, boundaries on padding included."""

from __future__ import annotations

import pytest
import torch

from megatron.ops.places import numbered


@pytest.mark.parametrize("seen", [None, (4, 0, 2)], ids=["new", "continued"])
@pytest.mark.parametrize("documents", [False, True], ids=["row", "documents"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_equals_counting(padded: bool, documents: bool, seen: tuple[int, ...] | None) -> None:
    b, s = 3, 14
    g = torch.Generator().manual_seed(5)
    mask = (torch.rand(b, s, generator=g) < 0.6).long() if padded else None
    ids = (torch.rand(b, s, generator=g) < 0.3).long().cumsum(1) if documents else None
    before = None if seen is None else torch.tensor(seen)
    places, after = numbered(b, s, mask, ids, before, torch.device("cpu"))
    for row in range(b):
        count = 0 if seen is None else seen[row]
        for t in range(s):
            if ids is not None and t and ids[row, t] != ids[row, t - 1]:
                count = 0
            if mask is None or mask[row, t]:
                assert int(places[row, t]) == count, (row, t)
                count += 1
        assert int(after[row]) == count
