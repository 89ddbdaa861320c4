"""`manifest.json`: what a checkpoint holds, precise enough to read it on another mesh and to name any damaged file.

format, version        so that a later release knows what it reads
save_id                repeated in the header of every shard file: files of different saves cannot mix unnoticed
iteration, state       the training state (data cursor, counters), mesh, model_config, library versions
weights                name -> shape, dtype, cut (tensor-parallel sharding), stage, parts; a part is a shard: a slice in a file
optimizer              name -> parts; here a shard is a range of the flattened local slice: fp32 master and moments
files                  name -> size, SHA-256 of every block (`block_hashes.py`)
sha256                 of everything else, so that a flipped bit in this file is detected too
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.checkpoint.block_hashes import FileEntry, file_entry
from megatron.checkpoint.layout import MANIFEST, iteration_of, tp_rank_of
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.validate import check_body
from megatron.errors import CheckpointError, DamagedCheckpoint
from megatron.files import read_json, write_text
from megatron.parallel.shard_spec import Slice

FORMAT = "metala-checkpoint"
VERSION = 2
_READABLE = (1, VERSION)  # version 1 had one hash per file


@dataclass(frozen=True)
class WeightShard:
    """One stored slice of a weight: `[start, stop)` on `dim` of the global tensor (dim None: all of it), in `file`."""

    file: str
    dim: int | None
    start: int
    stop: int

    @property
    def tp(self) -> int | None:
        """The tensor-parallel rank that wrote it."""
        return tp_rank_of(self.file)


@dataclass(frozen=True)
class WeightEntry:
    """A weight under its logical name.

    Attributes:
        shape: of the global tensor.
        dtype: name without the `torch.` prefix.
        cut: how tensor parallelism shards it (`parallel/shard_spec.py`).
        stage: index in the flat list of pipeline stages.
        parts: its stored shards.
    """

    shape: tuple[int, ...]
    dtype: str
    cut: str
    stage: int
    parts: tuple[WeightShard, ...]

    def slice_of(self, shard: WeightShard) -> Slice:
        """The slice of the global tensor that a shard holds."""
        return Slice(self.shape, shard.dim, shard.start, shard.stop)

    def optimizer_span(self, shard: OptimizerShard) -> FlatRange:
        """The range of this weight's flattened slice that an optimizer shard covers."""
        return FlatRange(Slice(self.shape, shard.dim, shard.start, shard.stop), shard.range_start, shard.range_stop)


@dataclass(frozen=True)
class OptimizerShard:
    """Optimizer state of `[range_start, range_stop)` of a flattened local slice (dim, start, stop as in WeightShard).

    The ranges of one (pp, tp) rank tile the slice. Parameters that are replicated over tensor-parallel ranks, and a tied
    output projection, are stored by several ranks.

    Attributes:
        file: holds `master/<name>` (fp32) and `<moment>/<name>` for each of `moments`.
        pp: pipeline rank that wrote it.
        tp: tensor-parallel rank that wrote it.
        step: the parameter's update count.
        moments: names of the optimizer's moments, such as `exp_avg`.
    """

    file: str
    pp: int
    tp: int
    dim: int | None
    start: int
    stop: int
    range_start: int
    range_stop: int
    step: int
    moments: tuple[str, ...]

    @property
    def holder(self) -> tuple[int | None, int, int, int, int]:
        """What the shards that tile one slice share: the slice, and the (pp, tp) rank that wrote them."""
        return (self.dim, self.start, self.stop, self.pp, self.tp)


@dataclass(frozen=True)
class Manifest:
    """The complete description; the module's docstring explains the fields."""

    iteration: int
    save_id: str
    mesh: Mapping[str, int]
    model_config: Mapping[str, Any]
    state: Mapping[str, Any]
    engine: Mapping[str, Any]
    facts: Mapping[str, Any]
    versions: Mapping[str, str]
    weights: Mapping[str, WeightEntry]
    optimizer: Mapping[str, tuple[OptimizerShard, ...]]
    files: Mapping[str, FileEntry]
    format: str = FORMAT
    version: int = VERSION
    sha256: str = field(default="", compare=False)


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in body.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder/manifest.json`, with its own checksum, synced."""
    body = json.loads(json.dumps(asdict(manifest)))  # tuples become lists before the hash is taken
    body["sha256"] = _digest(body)
    write_text(folder / MANIFEST, json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def _damaged(path: Path, reason: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        "the checkpoint's manifest is damaged", where=str(path), why=reason, hint="use an older checkpoint"
    )


def _plain_name(name: str) -> bool:
    """Whether a file name in the manifest stays inside the checkpoint's folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def weight_entry(value: Mapping[str, Any]) -> WeightEntry:
    """Parse a weight's entry.

    Raises:
        KeyError, TypeError: a field is missing.
    """
    shards = tuple(WeightShard(**shard) for shard in value["parts"])
    return WeightEntry(tuple(value["shape"]), value["dtype"], value["cut"], value["stage"], shards)


def _build(body: dict[str, Any]) -> Manifest:
    weights = {name: weight_entry(value) for name, value in body["weights"].items()}
    optimizer = {
        name: tuple(OptimizerShard(**{**shard, "moments": tuple(shard["moments"])}) for shard in shards)
        for name, shards in body["optimizer"].items()
    }
    files = {name: file_entry(entry) for name, entry in body["files"].items()}
    return Manifest(**{**body, "weights": weights, "optimizer": optimizer, "files": files})


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder.

    Raises:
        CheckpointError: the manifest is absent, not JSON, altered, of another format or version, or its step differs from
            the folder's name.
    """
    path = Path(path)
    file = path / MANIFEST
    try:
        body = read_json(file)
    except FileNotFoundError:
        pickles = (
            "; it holds *.pt files: a GPT-NeoX/DeepSpeed checkpoint must be imported first"
            if any(path.glob("*_states.pt"))
            else ""
        )
        reason = "manifest.json is missing, the save was never finished" if path.is_dir() else "no such folder"
        raise DamagedCheckpoint("not a checkpoint", where=str(path), why=reason + pickles) from None
    except (OSError, ValueError) as error:
        raise _damaged(file, f"not readable as JSON ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _damaged(file, f"its format is not '{FORMAT}'")
    if body.get("sha256") != _digest(body):
        raise _damaged(file, "its content does not match its own checksum")
    version = body.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            "the checkpoint was written by a newer release",
            where=str(file),
            why=f"version {version}, this code reads {' and '.join(map(str, _READABLE))}",
        )
    try:
        if version not in _READABLE:
            raise ValueError(f"version is {version!r:.60}")
        check_body(body)
        manifest = _build(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(file, f"a field is missing or wrong: {error}") from error
    _cross_check(path, manifest)
    return manifest


def _cross_check(path: Path, manifest: Manifest) -> None:
    named = iteration_of(path.name.split(".")[0])
    if named is not None and named != manifest.iteration:
        raise DamagedCheckpoint(
            "the folder's name and its manifest disagree",
            where=str(path),
            why=f"the manifest is of step {manifest.iteration}",
            hint="rename the folder back",
        )
    shard_files = {shard.file for entry in manifest.weights.values() for shard in entry.parts}
    shard_files |= {shard.file for shards in manifest.optimizer.values() for shard in shards}
    for name in [*manifest.files, *shard_files]:
        if not _plain_name(name) or name not in manifest.files:
            raise _damaged(path / MANIFEST, f"'{name}' is not a listed file inside the checkpoint")
