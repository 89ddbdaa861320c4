"""Text for `tools/checkpoint.py`: the content of a checkpoint, and the differences between two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint.compare import differences, model_differences
from megatron.checkpoint.load import read_slices
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.tensor_reader import CheckpointReader
from megatron.parallel.shard_spec import Slice


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _parameter_count(manifest: Manifest) -> int:
    return sum(FlatRange.full(Slice(entry.shape, None, 0, 0)).stop for entry in manifest.weights.values())


def inspect(path: str | Path, tensors: bool = False) -> str:
    """A page about one checkpoint: step, mesh, model, sizes, versions.

    Args:
        path: a `global_step<N>` folder.
        tensors: add one line per weight.
    """
    manifest = read_manifest(path)
    kinds: dict[str, list[int]] = {}
    for name, entry in manifest.files.items():
        kind = name.split("/")[0].split("-")[0].split("_")[0]
        kinds.setdefault({"layer": "weights", "optim": "optimizer", "rng": "random numbers"}.get(kind, kind), []).append(
            entry.size
        )
    moments = sorted({m for parts in manifest.optimizer.values() for part in parts for m in part.moments})
    dtypes = sorted({entry.dtype for entry in manifest.weights.values()})
    lines = [
        f"{path}: step {manifest.iteration}, save {manifest.save_id}, format {manifest.format} {manifest.version}",
        "mesh       " + " x ".join(f"{axis} {size}" for axis, size in manifest.mesh.items()) + _context(manifest),
        f"weights    {len(manifest.weights)} tensors, {_parameter_count(manifest):,} parameters, {', '.join(dtypes)}",
        f"optimizer  {'fp32 master, ' + ', '.join(moments) if manifest.optimizer else 'none'}",
        "files      " + ", ".join(f"{kind} {len(sizes)} ({_size(sum(sizes))})" for kind, sizes in sorted(kinds.items())),
        "state      " + json.dumps(dict(manifest.state)),
        "engine     " + json.dumps(dict(manifest.engine)),
        "versions   " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "model      " + json.dumps(dict(manifest.model_config)),
    ]
    if tensors:
        width = max(map(len, manifest.weights), default=0)
        for name, weight in manifest.weights.items():
            shape = " x ".join(map(str, weight.shape)) or "scalar"
            lines.append(
                f"  {name:<{width}}  {weight.dtype}  {shape}  {weight.cut}  stage {weight.stage}  {len(weight.parts)} parts"
            )
    return "\n".join(lines)


def _context(manifest: Manifest) -> str:
    """The part of the data-parallel ranks that held shards of the same samples; empty where each held its own."""
    size = manifest.facts.get("context_parallel_size")
    return f" (dp of {size} context-parallel ranks each)" if isinstance(size, int) and size > 1 else ""


def _difference(a: Tensor, b: Tensor) -> str:
    """Empty when bitwise identical, else the number of differing elements and the largest difference."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
    if torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)):
        return ""
    apart = (a.double() - b.double()).abs()
    return f"{int((apart != 0).sum())} of {a.numel()} elements, at most {float(apart.nan_to_num(float('inf')).max()):.3g} apart"


def _tensors(reader: CheckpointReader, name: str, optimizer: bool) -> dict[str, Tensor]:
    """A parameter's full weight, and its full optimizer state."""
    tensors = {"weight": reader.weight(name)}
    if optimizer:
        span = FlatRange.full(Slice(reader.manifest.weights[name].shape, None, 0, 0))
        state = read_slices(reader, {name: reader.optimizer_reads(name, span)})[name]
        tensors |= {"master": state.master, **state.moments, "step": torch.tensor(state.step)}
    return tensors


def diff(a: str | Path, b: str | Path) -> Iterator[str]:
    """One line per difference; tensors are compared bitwise, whatever mesh each was saved on.

    Raises:
        CheckpointError: one of them is damaged.
    """
    first, second = read_manifest(a), read_manifest(b)
    for section in ("state", "model_config", "engine"):
        compare = model_differences if section == "model_config" else differences
        for text in compare(dict(getattr(first, section)), dict(getattr(second, section))).values():
            yield f"{section}: " + text.replace(" in the checkpoint", " in the first").replace(" here", " in the second")
    for name in sorted(set(first.weights) ^ set(second.weights)):
        yield f"{name}: only in the {'first' if name in first.weights else 'second'}"
    both = bool(first.optimizer) and bool(second.optimizer)
    if bool(first.optimizer) != bool(second.optimizer):
        yield f"optimizer state: only in the {'first' if first.optimizer else 'second'}"
    with CheckpointReader(Path(a), first) as first_reader, CheckpointReader(Path(b), second) as second_reader:
        for name in sorted(set(first.weights) & set(second.weights)):
            if first.weights[name].shape != second.weights[name].shape:
                yield f"{name}: shape {list(first.weights[name].shape)} and {list(second.weights[name].shape)}"
                continue
            first_tensors, second_tensors = _tensors(first_reader, name, both), _tensors(second_reader, name, both)
            for kind in first_tensors:
                text = _difference(first_tensors[kind], second_tensors[kind]) if kind in second_tensors else "only in the first"
                if text:
                    yield f"{name} {kind}: {text}"
