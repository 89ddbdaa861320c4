"""What mixers compute while a context-parallel message is on its way: forward, backward and recomputed, in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron.layers.base import Context, Layer
from megatron.parallel.context import ContextParallel
from tests.parallel.context_cases import B, D, DeltaRule, documents, make_layer, shard_length
from tests.parallel.test_context import BY_HEADS, MIXERS

PRODUCTS = ("mm", "addmm", "bmm")


class _Events(TorchDispatchMode):
    """Messages and matrix products, in the order in which they happen: "start 0", "mm", "wait 0", ..."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def behind_messages(self, since: int = 0) -> int:
        """Matrix products between the start of a message and the wait for it: the most of any message."""
        names, most = self.names[since:], 0
        for i, name in enumerate(names):
            if name.startswith("start"):
                until = names.index(name.replace("start", "wait"), i)
                most = max(most, sum(n in PRODUCTS for n in names[i:until]))
        return most


class _Shard(ContextParallel):
    """The last shard of a row; its messages arrive as copies of what it sends, and their starts and waits are recorded."""

    events: _Events

    def _recorded(self, received: Tensor) -> Callable[[], Tensor]:
        number = sum(name.startswith("start") for name in self.events.names)
        self.events.names.append(f"start {number}")

        def wait() -> Tensor:
            self.events.names.append(f"wait {number}")
            return received

        return wait

    def start_all_gather(self, x: Tensor) -> Callable[[], Tensor]:
        """As if every rank sent the same."""
        return self._recorded(x.expand(self.size, *x.shape).clone())

    def start_shift(self, x: Tensor, by: int) -> Callable[[], Tensor]:
        """As if the neighbour sent the same."""
        return self._recorded(x.clone())


def _run(layer: Any, length: int, exchange: str = "all_gather", recompute: bool = False) -> tuple[_Events, int]:
    """The events of a pass forward and back, and how many of them belong to the forward."""
    ids = documents("crossing", 2, length)
    assert ids is not None
    shard = _Shard(None, 1, 2, B, length, ids, exchange)
    x = torch.randn(B, length, D, dtype=torch.float64, requires_grad=True)

    def run(u: Tensor) -> Tensor:
        return layer(u, Context(segment_ids=ids[:, length:], cp=shard))[0]

    shard.events = _Events()
    with shard.events:
        y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        forward = len(shard.events.names)
        y.sum().backward()
    return shard.events, forward


def _layer(label: str) -> tuple[Layer, int]:
    layer = make_layer(MIXERS[label][0], **MIXERS[label][1])
    return layer, shard_length(layer)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "mixer",
    ["metala", "based", "based, fixed decay", "jrt, prefix over 1.6 shards", "mamba", "base_conv", "sliding", "alibi, window"],
)
def test_projections_overlap_with_a_message_in_either_direction(mixer: str, recompute: bool) -> None:
    events, forward = _run(*_layer(mixer), recompute=recompute)
    assert events.behind_messages() > 0
    # the projection's two gradients, in the backward; with recomputation the forward is in there again
    assert events.behind_messages(forward) >= 2, events.names[forward:]


def test_a_message_that_is_awaited_at_once_overlaps_with_nothing() -> None:
    """The measure itself: `ctx.start` of the toy rule."""
    events, forward = _run(DeltaRule().double(), 37)
    assert events.behind_messages() == 0 and events.behind_messages(forward) == 0
    assert any(name.startswith("start") for name in events.names[:forward])
    assert any(name.startswith("start") for name in events.names[forward:])


def test_rounds_of_a_scan_follow_from_each_other() -> None:
    """No message of the scan travels before its result is needed."""
    events, _ = _run(*_layer("based"), exchange="scan")
    assert events.behind_messages() == 0


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"delta", *BY_HEADS}))
def test_every_message_is_awaited_once(mixer: str) -> None:
    events, _ = _run(*_layer(mixer))
    starts = [name for name in events.names if name.startswith("start")]
    assert starts and [events.names.count(name.replace("start", "wait")) for name in starts] == [1] * len(starts)
