"""`manifest.json`: what a checkpoint holds, precise enough to read it on another mesh and to name any damaged file.

format, version        so that a later release knows what it reads
save_id                the same text stands in the header of every shard: generations cannot mix unseen
iteration, state       the training state (cursor, counters), mesh, model_config, versions of the libraries
weights                name -> shape, dtype, cut, stage, parts; a part is a slice in a file
optimizer              name -> parts; a part is a range of the flattened local slice: fp32 master and moments in a file
files                  name -> size, SHA-256 of every block (`block_hashes.py`)
sha256                 of all the rest, so that a flipped bit in this file is seen as well
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.checkpoint.block_hashes import FileEntry, file_entry
from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.checkpoint.layout import MANIFEST, iteration_of
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.validate import check_body
from megatron.errors import CheckpointError
from megatron.files import read_json, write_text
from megatron.parallel.shard_spec import Slice

FORMAT = "metala-checkpoint"
VERSION = 2
_READABLE = (1, VERSION)  # version 1 had one hash per file


@dataclass(frozen=True)
class WeightPart:
    """One stored slice of a weight: `[start, stop)` on `dim` of the global tensor (dim None: all of it), in `file`."""

    file: str
    dim: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class WeightEntry:
    """A weight under its logical name: global shape, dtype, tensor-parallel cut, stage index, stored parts."""

    shape: tuple[int, ...]
    dtype: str
    cut: str
    stage: int
    parts: tuple[WeightPart, ...]

    def slice_of(self, part: WeightPart) -> Slice:
        """The slice of the global tensor that a part holds."""
        return Slice(self.shape, part.dim, part.start, part.stop)

    def optimizer_span(self, part: OptimizerPart) -> FlatRange:
        """The range of this weight's flattened slice that a stored optimizer part covers."""
        return FlatRange(Slice(self.shape, part.dim, part.start, part.stop), part.range_start, part.range_stop)


@dataclass(frozen=True)
class OptimizerPart:
    """The optimizer's numbers for `[range_start, range_stop)` of a flattened local slice (dim, start, stop as in
    WeightPart).

    In `file` lie `master/<name>` (fp32) and `<moment>/<name>` for each of `moments`; `step` is the parameter's
    update count.
    pp, tp: the rank that held it. The ranges of one (pp, tp) tile the slice; parameters that are replicated over
    tensor ranks, and a tied output projection, are held by several.
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
        """What the parts that tile one slice have in common: the slice, and the ranks that held it."""
        return (self.dim, self.start, self.stop, self.pp, self.tp)


@dataclass(frozen=True)
class Manifest:
    """The whole description; see the head of this file."""

    iteration: int
    save_id: str
    mesh: Mapping[str, int]
    model_config: Mapping[str, Any]
    state: Mapping[str, Any]
    engine: Mapping[str, Any]
    facts: Mapping[str, Any]
    versions: Mapping[str, str]
    weights: Mapping[str, WeightEntry]
    optimizer: Mapping[str, tuple[OptimizerPart, ...]]
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


def _damaged(path: Path, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint("the checkpoint's manifest is damaged", where=str(path), why=why, hint="use an older checkpoint")


def _plain_name(name: str) -> bool:
    """Whether a file name of the manifest stays inside the checkpoint's folder."""
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def weight_entry(value: Mapping[str, Any]) -> WeightEntry:
    """A weight's entry from its JSON; KeyError or TypeError when a field is missing."""
    parts = tuple(WeightPart(**part) for part in value["parts"])
    return WeightEntry(tuple(value["shape"]), value["dtype"], value["cut"], value["stage"], parts)


def _build(body: dict[str, Any]) -> Manifest:
    weights = {name: weight_entry(value) for name, value in body["weights"].items()}
    optimizer = {
        name: tuple(OptimizerPart(**{**part, "moments": tuple(part["moments"])}) for part in parts)
        for name, parts in body["optimizer"].items()
    }
    files = {name: file_entry(entry) for name, entry in body["files"].items()}
    return Manifest(**{**body, "weights": weights, "optimizer": optimizer, "files": files})


def read_manifest(path: str | Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder.

    Raises:
        CheckpointError: absent, not JSON, of another format or version, altered, or of another step than its folder
            says.
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
        why = "manifest.json is missing, the save was never finished" if path.is_dir() else "no such folder"
        raise DamagedCheckpoint("not a checkpoint", where=str(path), why=why + pickles) from None
    except (OSError, ValueError) as error:
        raise _damaged(file, f"not readable as JSON ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _damaged(file, f"its format is not '{FORMAT}'")
    if body.get("sha256") != _digest(body):
        raise _damaged(file, "its content does not match its own checksum")
    version = body.get("version")
    if type(version) is int and version > VERSION:
        raise CheckpointError(
            "the checkpoint is of another release",
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
    used = {part.file for entry in manifest.weights.values() for part in entry.parts}
    used |= {part.file for parts in manifest.optimizer.values() for part in parts}
    for name in [*manifest.files, *used]:
        if not _plain_name(name) or name not in manifest.files:
            raise _damaged(path / MANIFEST, f"'{name}' is not a listed file inside the checkpoint")
