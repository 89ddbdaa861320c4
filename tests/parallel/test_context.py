"""Context parallelism on gloo ranks: exchanges against their definition, mixers against one process, bytes, planted faults."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.layers.base import Context
from megatron.model.embed import Embedding
from megatron.ops import places as token_places
from megatron.ops.attention.operator import Places, Rule
from megatron.ops.attention.triton import route
from megatron.parallel import context
from megatron.parallel.context import ContextParallel
from megatron.parallel.context_exchange import Carry
from megatron.parallel.context_messages import ContextMessages
from megatron.planning.context_traffic import PlannedShard, Traffic
from tests.parallel.context_cases import (
    GATHER,
    LAYOUTS,
    RECOMPUTED,
    B,
    D,
    compare_layers,
    documents,
    largest_error,
    make_layer,
    most_sent,
    shard_length,
    shard_of_row,
    whole_row,
    worst,
)
from tests.parallel.ranks import run_ranks

LIMIT = 1e-10  # fp64
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "metala": ("metala", {}),
    "based": ("based", {"feature_width": 8}),
    "based, fixed decay": ("based", {"feature_width": 8, "decay": True}),
    "jrt, prefix over 1.6 shards": ("jrt", {"feature_width": 8, "prefix_length": 59}),
    "mamba": ("mamba", {"state_size": 8}),
    "base_conv": ("base_conv", {}),
    "sliding": ("sliding", {"window": 40}),
    "alibi, window": ("alibi", {"window": 9}),
    "global, grouped queries and a window": ("global", {"positions": "rotary", "kv_heads": 2, "window": 11}),
    "global": ("global", {"positions": "rotary", "qk_norm": True, "bias": True}),
    "alibi": ("alibi", {}),
    "delta": ("delta", {}),
}
BY_HEADS = ("global", "alibi")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 5])
def test_shards_equal_the_whole_row(size: int) -> None:
    """Every mixer, three layouts of documents, gathered, scanned and recomputed; 4 heads do not divide by 5."""
    mixers = {label: mixer for label, mixer in MIXERS.items() if label not in BY_HEADS or 4 % size == 0}
    errors = worst(run_ranks(compare_layers, size, mixers, timeout=240))
    assert max(errors.values()) <= LIMIT, errors


def test_slopes_that_shrink_see_the_length_of_the_row() -> None:
    """ALiBi's `train_length`: also with a window the row is exchanged by heads."""
    mixers = {str(w): ("alibi", {"train_length": 50, "window": w}) for w in (None, 20)}
    errors = worst(run_ranks(compare_layers, 2, mixers, layouts=("none",), ways=(GATHER,)))
    assert max(errors.values()) <= LIMIT, errors


@functools.cache
def _traffic() -> list[dict[str, Any]]:
    return run_ranks(compare_layers, 4, MIXERS, width=64, layouts=("none", "crossing"), ways=(GATHER, RECOMPUTED), timeout=240)


@pytest.mark.slow
def test_four_shards_equal_the_whole_row() -> None:
    """The results of which the next test reads the bytes; every mixer, those whose heads are exchanged too."""
    errors = worst(_traffic())
    assert max(errors.values()) <= LIMIT, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "forward", "backward"),
    [
        ("metala", 29_184, 27_648),
        ("based", 146_880, 146_880),
        ("based, fixed decay", 148_512, 146_880),  # D is constant: 4 heads of 17 columns, once for all rows
        ("jrt, prefix over 1.6 shards", 293_760, 293_760),  # one carry each way
        ("mamba", 104_448, 55_296),
        ("base_conv", 4_096, 4_096),
        ("sliding", 81_920, 81_920),
        ("alibi", 4 * 3 * 37 * 64 * 2 * 8 // 4, 4 * 3 * 37 * 64 * 2 * 8 // 4),  # 4 (P - 1) / P s d activations
        ("delta", 98_304, 49_152),
    ],
)
def test_bytes_of_the_busiest_of_four_ranks(mixer: str, forward: int, backward: int) -> None:
    """b 2, d 64, 4 heads, fp64: (P - 1)(|A| + |D|) and a halo forward, (P - 1)|A| and a halo back; recomputed: once more."""
    assert most_sent(_traffic(), mixer, "forward") == {forward}
    assert most_sent(_traffic(), mixer, "backward") == {backward, forward + backward}


def _carry_by_definition(
    states: Tensor, decays: Tensor | None, ids: Tensor | None, length: int, matrix: bool, reverse: bool
) -> list[Tensor]:
    """The state before each of the P shards, one shard after the other: `states [P, b, h, k, v]`."""
    order = range(len(states) - 1, -1, -1) if reverse else range(len(states))
    state, incoming = torch.zeros_like(states[0]), [states[0]] * len(states)
    for r in order:
        first, last = r * length, (r + 1) * length - 1
        if ids is not None and r != order[0]:
            same = ids[:, last] == ids[:, last + 1] if reverse else ids[:, first] == ids[:, first - 1]
            state = state * same[:, None, None, None]
        incoming[r] = state
        if decays is not None:
            state = decays[r] @ state if matrix else decays[r] * state
        if ids is not None:
            state = state * (ids[:, first] == ids[:, last])[:, None, None, None]
        state = state + states[r]
    return incoming


def _carries(length: int) -> dict[str, float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    g = torch.Generator().manual_seed(0)
    states, vector, full, dy = (torch.randn(size, B, 3, 4, n, generator=g, dtype=torch.float64) for n in (5, 1, 4, 5))
    errors = {}
    for kind, decays in (("none", None), ("vector", vector.sigmoid()), ("matrix", full / 2)):
        for layout in LAYOUTS:
            ids = documents(layout, size, length)
            for exchange in context.EXCHANGES:
                for reverse in (False, True):
                    leaves = [states.clone().requires_grad_()] + ([] if decays is None else [decays.clone().requires_grad_()])
                    decay = None if decays is None else leaves[1]
                    incoming = _carry_by_definition(leaves[0], decay, ids, length, kind == "matrix", reverse)
                    (torch.stack(incoming) * dy).sum().backward()
                    own = [x.detach()[rank].clone().requires_grad_() for x in leaves]
                    shard = ContextParallel(None, rank, size, B, length, ids, exchange)
                    y = shard.carry(*own, matrix=kind == "matrix", reverse=reverse)
                    (y * dy[rank]).sum().backward()
                    differences = [y - incoming[rank], *(a.grad - b.grad[rank] for a, b in zip(own, leaves, strict=True))]
                    errors[f"{kind} {layout} {exchange} {reverse}"] = max(float(x.detach().abs().max()) for x in differences)
    return errors


@pytest.mark.parametrize("size", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_carry_is_a_scan_over_the_ranks(size: int) -> None:
    """Both exchanges, both directions, three kinds of decays, gradients included."""
    for errors in run_ranks(_carries, size, 8):
        assert max(errors.values()) < 1e-13, errors


def _in_half_precision() -> tuple[torch.dtype, torch.dtype, set[int], float]:
    """A bf16 state and decay: what comes in, what gradients return, and how much travels."""
    rank, size = dist.get_rank(), dist.get_world_size()
    state = torch.full((1, 2, 3, 4), 1.0, dtype=torch.bfloat16, requires_grad=True)
    decay = torch.full((1, 2, 3, 1), 1.0 - 2.0**-12, dtype=torch.float32, requires_grad=True)
    shard = ContextParallel(None, rank, size, 1, 5)
    with context_traffic() as messages:
        y = shard.carry(state, decay)
        y.sum().backward()
    assert state.grad is not None and decay.grad is not None
    return y.dtype, decay.grad.dtype, {m.bytes // m.numel for m in messages}, float(y.max())


def context_traffic() -> Any:
    """`count_traffic`, looked up where the ranks import it."""
    from megatron.parallel.traffic import count_traffic

    return count_traffic()


def test_states_and_decays_travel_in_fp32() -> None:
    """A decay of 1 - 2^-12 would be 1 in bf16."""
    *_, last = run_ranks(_in_half_precision, 3)
    assert last[:3] == (torch.float32, torch.float32, {4}) and last[3] == pytest.approx(2 - 2.0**-12, abs=1e-7)


# Planted faults


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute inside the context."""
    real = owner.__dict__[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


_carry, _halo, _gather, _factors = (
    getattr(ContextParallel, n) for n in ("carry_async", "halo_async", "start_all_gather", "_factors")
)


def _then(wait: Callable[[], Tensor], change: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """Waits and changes the result."""
    return lambda: change(wait())


def _gradients(*passed: bool) -> Callable[..., Any]:
    """A carry that drops gradients."""
    real = Carry.receive_gradient

    def receive_gradient(self: Carry) -> Any:
        state, decay = real(self)
        return torch.zeros_like(state) if not passed[0] else state, decay if passed[1] else None

    return receive_gradient


FAULTS: dict[str, tuple[Any, str, Callable[[], Any], tuple[str, ...]]] = {
    "the decay is dropped": (
        ContextParallel, "carry_async", lambda: lambda self, state, decay=None, **k: _carry(self, state, None, **k),
        ("metala", "mamba", "based, fixed decay"),
    ),
    "two ranks are swapped": (
        ContextMessages, "start_all_gather", lambda: lambda self, x: _then(_gather(self, x), lambda y: y[[1, 0, 2, 3]]),
        ("metala", "mamba", "based, fixed decay"),
    ),
    "boundaries between shards are ignored": (
        ContextParallel, "_factors",
        lambda: lambda self, reverse: tuple(None if f is None else torch.ones_like(f) for f in _factors(self, reverse)),
        ("metala", "mamba", "based, fixed decay", "jrt, prefix over 1.6 shards"),
    ),
    "boundaries inside a shard are ignored": (
        ContextParallel, "_factors", lambda: lambda self, reverse: (_factors(self, reverse)[0],) * 2,
        ("metala", "mamba", "based, fixed decay", "jrt, prefix over 1.6 shards"),
    ),
    "the gradient of the state is dropped": (
        Carry, "receive_gradient", lambda: _gradients(False, True), ("metala", "mamba", "based, fixed decay"),
    ),
    "the gradient of the decay is dropped": (Carry, "receive_gradient", lambda: _gradients(True, False), ("metala", "mamba")),
    "the halo shows another document": (
        ContextParallel, "halo_hidden",
        lambda: lambda self, n, rows: torch.ones(rows, n, dtype=torch.bool) if self.rank == 0 else None,
        ("metala", "mamba", "base_conv"),
    ),
    "the halo returns no gradient": (
        ContextParallel, "halo_async", lambda: lambda self, x, n: _then(_halo(self, x, n), Tensor.detach),
        ("metala", "mamba", "base_conv", "sliding"),
    ),
    "a window sees another document": (
        ContextParallel, "ids_with_halo", lambda: lambda self, n, rows: torch.zeros(rows, n + self.length, dtype=torch.int32),
        ("sliding",),
    ),
    "the state from the right is lost": (
        ContextParallel, "carry_async",
        lambda: lambda self, s, d=None, **k: _then(_carry(self, s, d, **k), lambda y: y * (0 if k.get("reverse") else 1)),
        ("jrt, prefix over 1.6 shards",),
    ),
}  # fmt: skip


def _errors_with_faults() -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    results: dict[str, dict[str, float]] = {fault: {} for fault in FAULTS}
    g = torch.Generator().manual_seed(3)
    for label in sorted({label for *_, labels in FAULTS.values() for label in labels}):
        layer = make_layer(MIXERS[label][0], **MIXERS[label][1])
        length = shard_length(layer)
        x, dy = (torch.randn(B, size * length, D, generator=g, dtype=torch.float64) for _ in range(2))
        whole = {layout: whole_row(layer, x, dy, documents(layout, size, length), "auto") for layout in LAYOUTS}
        for fault, (owner, name, value, labels) in FAULTS.items():
            if label not in labels:
                continue
            errors = []
            for layout in LAYOUTS:
                with replaced(owner, name, value()):
                    shard = ContextParallel(None, rank, size, B, length, documents(layout, size, length))
                    errors.append(largest_error(whole[layout], shard_of_row(layer, x, dy, shard)[0], shard))
            results[fault][label] = max(errors)
    return results


@functools.cache
def _with_faults() -> list[dict[str, dict[str, float]]]:
    return run_ranks(_errors_with_faults, 4, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_exceeds_the_limit(fault: str) -> None:
    for label in FAULTS[fault][3]:
        assert max(rank[fault][label] for rank in _with_faults()) > 1e6 * LIMIT, label


COMMUNICATING = {f"{name}Backward" for name in ("_Send", "_Receive", "_AllToAll", "_Sum")}


def _graphs() -> list[dict[str, list[str]]]:
    """The nodes of each mixer's graph that communicate, in the order of a traversal; also with None for the first rank's zeros.

    A prefix that ends in a shard is padded there, so other nodes may differ.
    """

    def nodes(y: Tensor) -> list[str]:
        pending, visited, names = [y.grad_fn], set(), []
        while pending:
            node = pending.pop()
            if node is not None and node not in visited:
                visited.add(node)
                names += [node.name()] if node.name() in COMMUNICATING else []
                pending += [following for following, _ in node.next_functions]
        return names

    rank, size = dist.get_rank(), dist.get_world_size()
    graphs: list[dict[str, list[str]]] = [{}, {}]
    for mixer, (name, options) in MIXERS.items():
        if name == "delta":
            continue
        layer = make_layer(name, **options)
        length = shard_length(layer)
        shard = ContextParallel(None, rank, size, B, length, documents("crossing", size, length))
        at = slice(shard.offset, shard.offset + length)
        for ids, own in ((None, graphs[0]), (shard.segment_ids, graphs[0]), (None, graphs[1])):
            shard = ContextParallel(None, rank, size, B, length, ids)
            with replaced(ContextParallel, "carry_async", _carry if own is graphs[0] else _nothing_for_the_first):
                x = torch.randn(B, length, D, dtype=torch.float64, requires_grad=True)
                y, _ = layer(x, Context(segment_ids=None if ids is None else ids[:, at], cp=shard))
            own[f"{mixer} {ids is None}"] = nodes(y)
    return graphs


def _nothing_for_the_first(self: ContextParallel, *arguments: Any, **options: Any) -> Callable[[], Tensor | None]:
    wait = _carry(self, *arguments, **options)
    return lambda: None if self.rank == 0 else wait()


@pytest.mark.slow
def test_every_rank_builds_the_same_graph() -> None:
    """With None for the first rank's zeros a recomputed block could end before a collective that the others wait for."""
    first, *others = run_ranks(_graphs, 4, timeout=120)
    for other in others:
        assert first[0] == other[0] and all(first[0].values())
        assert first[1]["metala True"] != other[1]["metala True"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metala", "based", "mamba", "jrt", "base_conv"])
def test_fused_paths_take_and_return_the_exchanged_states(name: str) -> None:
    """The Triton paths against the reference in fp32: states, halos and all gradients, on a CPU by the interpreter."""
    pytest.importorskip("triton", reason="the fused kernels need Triton: pip install triton")
    options: dict[str, Any] = {"based": {"decay": True, "feature_width": 4}, "jrt": {"prefix_length": 23, "feature_width": 4}}
    layers = {name: (name, options.get(name, {}))}
    sizes: dict[str, Any] = {"width": 16, "heads": 2, "rows": 1, "least": 17}
    ways: dict[str, Any] = {"layouts": ("crossing",), "ways": (GATHER,), "backend": "triton", "dtype": torch.float32}
    if torch.cuda.is_available():
        pytest.skip("gloo ranks are on the CPU, where compiled kernels do not run")
    errors = worst(run_ranks(compare_layers, 2, layers, timeout=200, env={"TRITON_INTERPRET": "1"}, **sizes, **ways))
    assert errors[name] <= 3e-5, errors


# Without ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_learned_positions_start_at_the_offset(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, length = 4, 23
    ids = documents(layout, size, length)
    embedding = Embedding(11, D, places=size * length).double()
    with torch.no_grad():
        for p in embedding.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1)))
    x = torch.zeros(B, size * length, D, dtype=torch.float64)
    whole, _ = embedding.finish(x, Context(segment_ids=ids))

    def shards() -> Tensor:
        parts = []
        for rank in range(size):
            at = slice(rank * length, (rank + 1) * length)
            shard = ContextParallel(None, rank, size, B, length, ids)
            own = None if ids is None else ids[:, at]
            parts.append(embedding.finish(x[:, at], Context(segment_ids=own, cp=shard))[0])
        return torch.cat(parts, 1)

    assert torch.equal(shards(), whole)
    zero = torch.zeros(B, dtype=torch.long)
    monkeypatch.setattr("megatron.model.embed.document_offset", lambda *_: zero)  # positions of the shard
    assert not torch.equal(shards(), whole)
    assert torch.equal(
        token_places.document_offset(ContextParallel(None, 0, size, B, length, ids), B, torch.device("cpu")), zero
    )


@pytest.mark.parametrize("layout", ["none", "crossing"])
def test_a_window_over_shards_takes_the_fused_kernel_of_packed_rows(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many queries as keys, places without a cache, and the halo as a document or part of one."""
    layer = make_layer("sliding", window=20)
    asked: list[tuple[int, int, Places]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule, where: Places, **_: Any) -> Tensor:
        asked.append((q.shape[1], k.shape[1], where))
        return q

    monkeypatch.setattr("megatron.ops.attention.cache.attention", attend)
    shard = PlannedShard(None, 1, 2, B, 40, documents(layout, 2, 40))
    shard.traffic = Traffic()
    for _ in range(2):
        layer(torch.randn(B, 40, D, dtype=torch.float64), Context(cp=shard))
    (queries, keys, places), (_, _, again) = asked
    assert places.key is places.query and places.query_segment is not None
    assert route(True, queries, keys, Rule(0.3, 20), True, True, False, D // 4) == "varlen"
    assert again.query_segment is places.query_segment  # the bounds of documents are counted once for all layers
    row = torch.zeros(B, 80) if shard.segment_ids is None else shard.segment_ids
    assert torch.equal(places.query_segment, row[:, 20:].to(places.query_segment))
    first = PlannedShard(None, 0, 2, B, 40, documents(layout, 2, 40)).ids_with_halo(20, B)
    assert (first[:, :20] != first[:, 20:21]).all()


def test_a_row_longer_than_the_position_table_is_refused() -> None:
    embedding = Embedding(11, D, places=20)
    shard = ContextParallel(None, 0, 2, B, 16)
    with pytest.raises(ValueError, match="32 tokens, but the model has learned 20 positions"):
        embedding.finish(torch.zeros(B, 16, D), Context(cp=shard))


def test_refusals() -> None:
    shard = ContextParallel(None, 1, 2, B, 16)
    with pytest.raises(ValueError, match="rows without padding"):
        Context(mask=torch.ones(B, 16), cp=shard)
    with pytest.raises(ValueError, match="halo of 17 tokens needs a shard of at least as many"):
        shard.halo(torch.zeros(B, 16, D), 17)
    with pytest.raises(ValueError, match="3 heads cannot be divided among 2"):
        shard.to_heads(torch.zeros(B, 16, 3, 4))
    with pytest.raises(ValueError, match="all_gather, scan"):
        ContextParallel(None, 0, 2, B, 16, exchange="ring")
    with pytest.raises(ValueError, match=r"the whole row, got \(2, 16\)"):
        ContextParallel(None, 0, 2, B, 16, torch.zeros(B, 16))


def test_what_a_configuration_needs_to_refuse() -> None:
    """Longest halo and number of divisible heads, as options set them."""
    needs = {label: make_layer(name, **options).config for label, (name, options) in MIXERS.items() if name != "delta"}
    assert {label: config.cp_halo() for label, config in needs.items() if config.cp_halo()} == {
        "metala": 3, "mamba": 3, "base_conv": 2, "sliding": 40, "alibi, window": 9, "global, grouped queries and a window": 11,
    }  # fmt: skip
    assert {label: config.cp_divisor() for label, config in needs.items() if config.cp_divisor()} == {"global": 4, "alibi": 4}
    assert make_layer("alibi", window=9, train_length=64).config.cp_divisor() == 4
    assert make_layer("global", kv_heads=2).config.cp_divisor() == 2
