"""What must be true of a manifest before anything is done by its word: types, sizes, and that the stored pieces are the whole.

`read_manifest` calls this, so that resume, `verify`, export and every tool refuse the same manifests. A right checksum proves
only that the file is as it was written, not that what was written can be loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from megatron.checkpoint.safetensors_writer import CODES, dtype_name
from megatron.parallel.shard_spec import Slice, cut_dim
from megatron.training.state import TrainState

_DTYPES = {dtype_name(dtype): dtype.itemsize for dtype in CODES}
_CUTS = ("column", "row", "heads", "vocab", "replicated")
_MOST = 1 << 62  # bytes, elements, steps: more than any disk holds
_DIMENSIONS = 8
_Ranges = Sequence[tuple[int, int]]


class InvalidManifest(ValueError):
    """A manifest that no save can have written; the text says what is wrong."""


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise InvalidManifest(what)


def _count(value: Any, what: str, least: int = 0) -> int:
    _need(type(value) is int and least <= value <= _MOST, f"{what} is {_short(value)}, not a whole number from {least} up")
    return int(value)


def _text(value: Any, what: str) -> str:
    _need(isinstance(value, str) and bool(value), f"{what} is {_short(value)}, not a text")
    return str(value)


def _table(value: Any, what: str) -> dict[str, Any]:
    _need(isinstance(value, dict), f"{what} is {_short(value)}, not a table")
    return dict(value)


def _list(value: Any, what: str) -> list[Any]:
    _need(isinstance(value, list), f"{what} is {_short(value)}, not a list")
    return list(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_body(body: Mapping[str, Any]) -> None:
    """Check the JSON of a manifest of a version that is read here.

    Raises:
        InvalidManifest: a field is missing or of another type, a size is impossible, or the pieces of a tensor leave a hole or
            overlap.
    """
    _count(body.get("iteration"), "iteration")
    _text(body.get("save_id"), "save_id")
    mesh = _table(body.get("mesh"), "mesh")
    _need(set(mesh) == {"pp", "dp", "tp"}, f"mesh is {_short(mesh)}, not the sizes pp, dp and tp")
    for axis, size in mesh.items():
        _count(size, f"mesh.{axis}", 1)
    _need(prod(mesh.values()) <= _MOST, "the mesh has impossibly many ranks")
    for name in ("model_config", "state", "engine", "facts", "versions"):
        _table(body.get(name), name)
    _check_state(body["state"], body["engine"])
    sizes = {name: _check_file(name, entry) for name, entry in _table(body.get("files"), "files").items()}
    weights = _table(body.get("weights"), "weights")
    for name, entry in weights.items():
        _check_weight(name, _table(entry, f"the entry of '{name}'"), sizes)
    optimizer = _table(body.get("optimizer"), "optimizer")
    for name, parts in optimizer.items():
        _need(name in weights, f"there is optimizer state of '{name}', which is no weight")
        _check_optimizer(name, tuple(weights[name]["shape"]), _list(parts, f"the optimizer state of '{name}'"), sizes)
    without = sorted(set(weights) - set(optimizer)) if optimizer else []
    _need(not without, f"'{(without or [''])[0]}' has no optimizer state, others have")


def _check_state(state: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
    try:
        TrainState.from_dict(state)
    except (TypeError, ValueError) as error:
        raise InvalidManifest(f"state: {error}") from error
    scale = _table(engine.get("loss_scale") or {}, "engine.loss_scale")
    for name, value in scale.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _need(number and abs(value) < _MOST, f"engine.loss_scale.{name} is {_short(value)}, not a number")


def _check_file(name: str, entry: Any) -> int:
    """The size of a file."""
    entry = _table(entry, f"the entry of the file '{name}'")
    size = _count(entry.get("size"), f"the size of '{name}'")
    if "sha256" in entry:
        _text(entry["sha256"], f"the SHA-256 of '{name}'")
        return size
    for block in _list(entry.get("blocks"), f"the blocks of '{name}'"):
        _need(isinstance(block, list) and len(block) == 2, f"a block of '{name}' is {_short(block)}, not an end and a SHA-256")
        _count(block[0], f"the end of a block of '{name}'")
        _text(block[1], f"the SHA-256 of a block of '{name}'")
    return size


def _file_of(part: Mapping[str, Any], name: str, sizes: Mapping[str, int]) -> int:
    """The size of the file in which a part lies."""
    file = _text(part.get("file"), f"the file of a part of '{name}'")
    _need(file in sizes, f"'{file}' is not a listed file inside the checkpoint")
    return sizes[file]


def _slice(part: Any, shape: tuple[int, ...], name: str) -> Slice:
    """The slice that a part says it is of."""
    part, what = _table(part, f"a part of '{name}'"), f"a part of '{name}'"
    dim = part.get("dim")
    start, stop = _count(part.get("start"), f"the start of {what}"), _count(part.get("stop"), f"the stop of {what}")
    if dim is None:
        _need("dim" in part and start == stop == 0, f"{what} is a slice of no dimension")
        return Slice(shape, None, start, stop)
    _need(type(dim) is int and 0 <= dim < len(shape), f"{what} is cut on dimension {_short(dim)} of {len(shape)}")
    _need(start <= stop <= shape[dim], f"{what} is [{start}, {stop}) of {shape[dim]}")
    return Slice(shape, dim, start, stop)


def _check_weight(name: str, entry: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    shape = tuple(_count(n, f"a length of '{name}'") for n in _list(entry.get("shape"), f"the shape of '{name}'"))
    _need(len(shape) <= _DIMENSIONS and prod(shape) <= _MOST, f"'{name}' has the impossible shape {_short(list(shape))}")
    dtype, cut = entry.get("dtype"), entry.get("cut")
    _need(isinstance(dtype, str) and dtype in _DTYPES, f"'{name}' has the unknown dtype {_short(dtype)}")
    _need(isinstance(cut, str) and cut in _CUTS, f"'{name}' has the unknown cut {_short(cut)}")
    _need((cut_dim(cut) or 0) < max(1, len(shape)), f"'{name}' has {len(shape)} dimensions and the cut {cut}")  # type: ignore[arg-type]
    _count(entry.get("stage"), f"the stage of '{name}'")
    parts = _list(entry.get("parts"), f"the parts of '{name}'")
    slices = [_slice(part, shape, name) for part in parts]
    for part, piece in zip(parts, slices, strict=True):
        size, room = prod(piece.local_shape) * _DTYPES[str(dtype)], _file_of(part, name, sizes)
        _need(size <= room, f"a part of '{name}' takes {size} bytes, its file has {room}")
    check_tiles(name, shape, slices)


def _check_optimizer(name: str, shape: tuple[int, ...], parts: list[Any], sizes: Mapping[str, int]) -> None:
    slices = [_slice(part, shape, name) for part in parts]
    held: dict[Any, list[tuple[int, int]]] = {}
    moments = {tuple(_text(m, "a moment") for m in _list(part.get("moments"), f"the moments of '{name}'")) for part in parts}
    _need(len(moments) == 1, f"the optimizer parts of '{name}' have different moments, or there are none")
    for part, piece in zip(parts, slices, strict=True):
        start, stop = (_count(part.get(f"range_{end}"), f"a range of '{name}'") for end in ("start", "stop"))
        _need(start <= stop <= prod(piece.local_shape), f"a range of '{name}' is [{start}, {stop})")
        _count(part.get("step"), f"the step of '{name}'")
        room = _file_of(part, name, sizes)
        _need(4 * (stop - start) <= room, f"optimizer state of '{name}' takes more than its file has")
        place = (piece, _count(part.get("pp"), f"pp of '{name}'"), _count(part.get("tp"), f"tp of '{name}'"))
        held.setdefault(place, []).append((start, stop))
    check_tiles(name, shape, slices, held)


def check_tiles(name: str, shape: tuple[int, ...], slices: Iterable[Slice], held: Mapping[Any, _Ranges] | None = None) -> None:
    """Check that the stored pieces of a tensor are all of it and nothing twice.

    Args:
        slices: what its parts cover; equal ones are replicas. held: (slice, ...) -> the ranges of the flattened slice that one
            holder (pipeline and tensor rank) of it stored.

    Raises:
        InvalidManifest: a hole, or pieces on top of each other.
    """
    distinct, total = dict.fromkeys(slices), prod(shape)
    dims = {piece.dim for piece in distinct}
    dim = dims.pop() if len(dims) == 1 else None
    if dim is None:
        covered = sum(prod(piece.local_shape) for piece in distinct)
        _need(len(distinct) == 1, _misfit(name, covered, total))
    else:
        row = prod(n for i, n in enumerate(shape) if i != dim)
        _check_ranges(name, [(piece.start, piece.stop) for piece in distinct], shape[dim], row)
    for key, ranges in (held or {}).items():
        _check_ranges(name, ranges, prod(key[0].local_shape))


def _check_ranges(name: str, ranges: _Ranges, total: int, unit: int = 1) -> None:
    """Ranges in units of `unit` elements tile `[0, total)`."""
    at = 0
    for start, stop in sorted(ranges):
        _need(start == at, _misfit(name, unit * sum(b - a for a, b in ranges), unit * total))
        at = stop
    _need(at == total, _misfit(name, unit * sum(b - a for a, b in ranges), unit * total))


def _misfit(name: str, covered: int, total: int) -> str:
    twice = ", some of them twice" if covered >= total else ""
    return f"the stored parts of '{name}' do not fit together: they cover {covered} of {total} elements{twice}"
