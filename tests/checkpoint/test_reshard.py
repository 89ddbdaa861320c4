"""Reshardting as a pure function: what any rank of any of the 27 meshes reads from a checkpoint of any other, all 729 pairs."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest

from megatron.checkpoint.layout import layer_file, optimizer_file
from megatron.checkpoint.manifest import Manifest, OptimizerPart, WeightEntry, WeightPart
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.reshard import Place, Read, optimizer_reads, weight_reads
from megatron.parallel.mesh import Mesh
from megatron.parallel.shard_spec import ShardKind, slice_of

SIZES = (1, 2, 4)
MESHES = list(itertools.product(SIZES, SIZES, SIZES))  # pipeline, data, tensor
# name, shape, cut, stage: stages 2 to 5 are blocks, one for each of four pipeline ranks; sizes that ZeRO cuts in odd places
PARAMETERS: list[tuple[str, tuple[int, ...], ShardKind, int]] = [
    ("embed", (12, 5), "vocab", 0),
    *(
        row
        for i in range(4)
        for row in (
            (f"{i}.q", (8, 5), "column", i + 2),
            (f"{i}.o", (5, 8), "row", i + 2),
            (f"{i}.a", (4, 3), "heads", i + 2),
            (f"{i}.n", (5,), "replicated", i + 2),
        )
    ),
    ("scale", (), "replicated", 7),
]
SHAPES = {name: (shape, cut) for name, shape, cut, _ in PARAMETERS}


def held(pp: int, pp_rank: int) -> list[str]:
    """Names on a pipeline rank; the last one also holds a copy of the embedding (a tied matrix)."""
    names = [n for n, _, _, s in PARAMETERS if min(pp - 1, max(0, s - 2) * pp // 4) == pp_rank]
    return names + (["embed"] if pp > 1 and pp_rank == pp - 1 else [])


def numbers(name: str, mesh: Mesh) -> np.ndarray[Any, Any]:
    """Global element numbers of a rank's part, flat."""
    shape, cut = SHAPES[name]
    part = slice_of(shape, cut, mesh.tp_rank, mesh.tp)
    whole = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    return (whole if part.dim is None else whole.take(range(part.start, part.stop), axis=part.dim)).reshape(-1)


def owned(mesh: Mesh) -> dict[str, tuple[int, int]]:
    """ZeRO: all of a rank's parameters flat, one after the other, padded, in equal shares; name -> its range in this share."""
    names, offset, places = held(mesh.pp, mesh.pp_rank), 0, {}
    for name in names:
        size = numbers(name, mesh).size
        places[name] = (offset, offset + size)
        offset += size
    share = -(-offset // mesh.dp)
    low, high = mesh.dp_rank * share, (mesh.dp_rank + 1) * share
    cut = {n: (max(a, low) - a, min(b, high) - a) for n, (a, b) in places.items()}
    return {name: (start, stop) for name, (start, stop) in cut.items() if start < stop}


@cache
def saved(pp: int, dp: int, tp: int) -> tuple[Manifest, dict[tuple[str, str], np.ndarray[Any, Any]]]:
    """The manifest that a mesh would write, and (file, key) -> element numbers in place of values."""
    weights: dict[str, WeightEntry] = {}
    optimizer: dict[str, tuple[OptimizerPart, ...]] = {}
    content: dict[tuple[str, str], np.ndarray[Any, Any]] = {}
    stages = {name: stage for name, _, _, stage in PARAMETERS}
    for rank in range(pp * dp * tp):
        mesh = Mesh(pp, dp, tp, rank)
        ranges = owned(mesh)
        for name in held(pp, mesh.pp_rank):
            (shape, cut), values = SHAPES[name], numbers(name, mesh)
            part = slice_of(shape, cut, mesh.tp_rank, tp)
            if mesh.dp_rank == 0 and not (name == "embed" and mesh.pp_rank):
                file = layer_file(stages[name], mesh.tp_rank)
                content[file, name] = values
                parts = weights[name].parts if name in weights else ()
                piece = WeightPart(file, part.dim, part.start, part.stop)
                weights[name] = WeightEntry(shape, "float32", cut, stages[name], (*parts, piece))
            if name in ranges:
                start, stop = ranges[name]
                file = optimizer_file(mesh.dp_rank, mesh.pp_rank, mesh.tp_rank)
                content[file, f"master/{name}"] = values[start:stop]
                own = OptimizerPart(file, mesh.pp_rank, mesh.tp_rank, part.dim, part.start, part.stop, start, stop, 3, ())
                optimizer[name] = (*optimizer.get(name, ()), own)
    manifest = Manifest(3, "", {"pp": pp, "dp": dp, "tp": tp}, {}, {}, {}, {}, {}, weights, optimizer, {})
    return manifest, content


def read(reads: tuple[Read, ...], size: int, content: dict[tuple[str, str], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Carry the reads out with numpy's strides; only `[start, stop)` of a stored tensor is touched."""
    result = np.full(size, -1)
    for one in reads:
        source = content[one.file, one.key][one.start : one.stop]
        assert source.size == one.stop - one.start
        for copy in one.copies:
            step = source.itemsize
            view = np.lib.stride_tricks.as_strided
            taken = view(source[copy.source :], copy.size, [s * step for s in copy.source_strides])
            target = view(result[copy.target :], copy.size, [s * step for s in copy.target_strides])
            assert np.all(target == -1), "an element is filled twice"
            target[...] = taken
    return result


def check(then: tuple[int, int, int], now: tuple[int, int, int], ranks: list[int]) -> None:
    """Every rank gets exactly its elements."""
    manifest, content = saved(*then)
    for rank in ranks:
        mesh = Mesh(*now, rank)
        place = Place(mesh.pp_rank, mesh.tp_rank)
        for name in held(mesh.pp, mesh.pp_rank):
            shape, cut = SHAPES[name]
            part, expected = slice_of(shape, cut, mesh.tp_rank, mesh.tp), numbers(name, mesh)
            found = read(weight_reads(name, manifest.weights[name], part, place), expected.size, content)
            assert np.array_equal(found, expected)
        for name, (start, stop) in owned(mesh).items():
            shape, cut = SHAPES[name]
            span = FlatRange(slice_of(shape, cut, mesh.tp_rank, mesh.tp), start, stop)
            plan = optimizer_reads(manifest, name, span, place)
            assert plan.step == 3
            assert np.array_equal(read(plan.master, stop - start, content), numbers(name, mesh)[start:stop])
            if then == now:  # its own file and nothing else
                assert {one.file for one in plan.master} == {optimizer_file(mesh.dp_rank, mesh.pp_rank, mesh.tp_rank)}


@pytest.mark.parametrize("then", MESHES, ids=str)
def test_one_rank_of_all_pairs(then: tuple[int, int, int]) -> None:
    for number, now in enumerate(MESHES):
        size = int(np.prod(now))
        check(then, now, [(number * 7 + sum(then)) % size])


@pytest.mark.slow
@pytest.mark.parametrize("then", MESHES, ids=str)
def test_every_rank_of_all_pairs(then: tuple[int, int, int]) -> None:
    for now in MESHES:
        check(then, now, list(range(int(np.prod(now)))))


def test_a_rank_reads_a_part_of_the_bytes() -> None:
    """From one rank to four: a quarter of each cut tensor's rows, and the runs between for one cut by columns."""
    manifest, _ = saved(1, 1, 1)
    shape, cut = SHAPES["0.q"]
    (rows,) = weight_reads("0.q", manifest.weights["0.q"], slice_of(shape, cut, 1, 4), Place())
    assert (rows.start, rows.stop) == (10, 20)
    shape, cut = SHAPES["0.o"]
    (columns,) = weight_reads("0.o", manifest.weights["0.o"], slice_of(shape, cut, 1, 4), Place())
    assert (columns.start, columns.stop) == (2, 36)
    assert [copy.size for copy in columns.copies] == [(5, 2)]
