"""What a run reads and writes, as the folders that a container must be given: mounts of Kubernetes and SkyPilot jobs."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

HOME = "/workspace"  # where the image holds this project
_IN_IMAGE = ("configs", "megatron", "tools", "tests", "docs", "benchmarks", "requirements")
_DATA = (
    "data_path",
    *(f"{split}{kind}" for split in ("train", "valid", "test") for kind in ("_data_paths", "_label_data_paths")),
)
_STREAMS = ("train_stream", "valid_stream", "test_stream")


def slug(text: str, limit: int = 40) -> str:
    """A name that every cluster takes: lower-case letters, digits and hyphens, a letter first."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}".rstrip("-"))[:limit].rstrip("-")


@dataclass(frozen=True)
class Folder:
    """One folder of a job. path: in the container. name: of its claim, volume or bucket. written: not only read."""

    path: str
    name: str
    written: bool

    @property
    def relative(self) -> str | None:
        """Its name inside the project's folder, None elsewhere."""
        return posixpath.relpath(self.path, HOME) if self.path.startswith(f"{HOME}/") else None


@dataclass(frozen=True)
class Places:
    """folders: to be mounted. files: read from the project's own folder itself, where nothing can be mounted.

    configs: path in the container -> text of each configuration file.
    """

    folders: tuple[Folder, ...] = ()
    files: tuple[str, ...] = ()
    configs: tuple[tuple[str, str], ...] = ()


def _paths(section: Any, keys: Iterable[str]) -> list[str]:
    """The values of path keys, lists taken apart, unset ones and datasets of a hub left out."""
    found: list[str] = []
    for key in keys:
        value = getattr(section, key)
        found += [] if not value else [value] if isinstance(value, str) else list(value)
    return [path for path in found if not path.startswith("hf:")]


def in_container(path: str) -> str:
    """Absolute path; relative ones lie in the project's folder."""
    return posixpath.normpath(posixpath.join(HOME, path))


def places_of(run: Any, configs: Iterable[tuple[str, str]] = ()) -> Places:
    """The places of a `RunConfig`. configs: (path as typed, text) of its files.

    A large corpus keeps its sample index beside it, so that folders of data count as written.
    """
    logging, checkpoint = run.logging, run.checkpoint
    written = [logging.run_dir, *_paths(checkpoint, ("save",)), *_paths(logging, ("log_dir", "tensorboard_dir"))]
    data, tokenizer = _paths(run.data, _DATA), _paths(run.tokenizer, ("vocab_file", "merge_file"))
    read = [*_paths(checkpoint, ("load",)), *_paths(run.data, _STREAMS)]
    found: dict[str, bool] = {}
    files: list[str] = []
    for path, is_file, is_written in (
        *((path, False, True) for path in written),
        *((path, True, True) for path in data),
        *((path, True, False) for path in tokenizer),
        *((path, False, False) for path in read),
    ):
        folder = _folder(in_container(path))
        if folder is None or (is_file and folder == in_container(path)):
            files.append(path)
        elif not (folder.startswith(f"{HOME}/") and PurePosixPath(folder).name in _IN_IMAGE):
            found[folder] = found.get(folder, False) or is_written
    outer = [path for path in found if not any(path.startswith(f"{other}/") for other in found)]
    folders = [Folder(p, _name(p), any(w for q, w in found.items() if q == p or q.startswith(f"{p}/"))) for p in outer]
    texts = tuple((in_container(path), text) for path, text in configs)
    return Places(tuple(folders), tuple(dict.fromkeys(files)), texts)


def _folder(path: str) -> str | None:
    """The folder to mount so that `path` is there: inside the project the first part, elsewhere the one that holds it."""
    if path == HOME:
        return None
    if path.startswith(f"{HOME}/"):
        return posixpath.join(HOME, posixpath.relpath(path, HOME).split("/")[0])
    parent = posixpath.dirname(path)
    return path if parent == "/" else parent


def _name(path: str) -> str:
    return slug(posixpath.relpath(path, HOME) if path.startswith(f"{HOME}/") else path)
