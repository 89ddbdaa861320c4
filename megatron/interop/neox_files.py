"""GPT-NeoX/DeepSpeed checkpoint folders as plain tensors: the files that are there, read by torch's restricted unpickler.

Two layouts exist. With pipeline size 1 and more: `layer_XX-model_YY-model_states.pt`, one file per stage XX and tensor rank YY,
keys relative to the stage. With pipeline size 0: `mp_rank_YY_model_states.pt`, one per tensor rank, keys `sequential.XX.<key>`.

The files are pickles. Only tensors, plain containers and numpy arrays may come out of them (`weights_only=True`): a file that
asks for anything else is refused by name before it runs. This is the only file of the package that opens a pickle.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.checkpoint.layout import LATEST, MANIFEST, contents, iteration_of, step_folders
from megatron.errors import CheckpointError
from megatron.files import read_text

_LAYER = re.compile(r"layer_([0-9]{1,18})-model_([0-9]{1,18})-model_states\.pt")
_RANK = re.compile(r"mp_rank_([0-9]{1,18})_model_states\.pt")
_SEQUENTIAL = re.compile(r"(?:module\.)?sequential\.([0-9]{1,18})\.(.+)")
_COPY = "copy it again from where the checkpoint was made"
_SAFE_TORCH = (2, 10)  # the restricted unpickler could be broken before (CVE-2025-32434, CVE-2026-24747)


def _numpy_globals() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What a random state of numpy is pickled as; the module was renamed in numpy 2."""
    core = np._core.multiarray  # type: ignore[attr-defined]
    named: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [np.ndarray, np.dtype]
    for home in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named += [(core._reconstruct, f"{home}._reconstruct"), (core.scalar, f"{home}.scalar")]
    return named + [type(np.dtype(kind)) for kind in ("u4", "i8", "f8", "u1", "i4", "f4", "b1")]


def read_pickle(path: Path) -> Any:
    """The content of a `torch.save`d file, memory-mapped where it can be, nothing in it run.

    Raises:
        CheckpointError: it asks for more than tensors, containers and numpy arrays, or is damaged.
    """
    release = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    if release < _SAFE_TORCH:
        raise CheckpointError(
            "this torch must not open foreign pickles", where=str(path), why=f"{torch.__version__} is older than 2.10"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(
            "the file is empty", where=str(path), why="it was not written, or not copied, to its end", hint=_COPY
        )
    try:
        os.close(open_regular(path))  # torch.load, which maps the file itself, would wait for the writer of a pipe
        with torch.serialization.safe_globals(_numpy_globals()):
            # files of torch before 1.6 are no archives, and cannot be mapped
            return torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if not named and not re.search(r"Unsupported (?:global|class)|not allowed", str(error)):
            raise CheckpointError(
                "the file is damaged", where=str(path), why="it is not what torch.save writes", hint=_COPY
            ) from None
        why = f"it asks for {named[1]}" if named else str(error).splitlines()[0]
        raise CheckpointError(
            "the file holds more than tensors and was not run",
            where=str(path),
            why=why,
            hint="save the weights again without it; this tool never executes what it finds in a file",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "the file cannot be read",
            where=str(path),
            why=str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__,
            hint=_COPY,
        ) from None


def newest_foreign(path: Path) -> Path:
    """`path`, or the newest `global_stepN` in it, as its `latest` says."""
    steps = step_folders(path)
    if not steps or any(path.glob("*_states.pt")):
        return path
    named = None
    with contextlib.suppress(OSError, ValueError):
        named = iteration_of(read_text(path / LATEST, 4096).strip())
    return steps[named if named in steps else max(steps)]


def layer_name(stage: int, rank: int) -> str:
    """The file of one stage and tensor rank."""
    return f"layer_{stage:02d}-model_{rank:02d}-model_states.pt"


def missing_files(path: Path, names: Sequence[str]) -> CheckpointError:
    """The error of a checkpoint without all of its files."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    why = ", ".join(names[:8]) + more
    return CheckpointError(
        "files of the checkpoint are missing",
        where=str(path),
        why=why,
        hint="copy them again from where the checkpoint was made",
    )


def _no_foreign_checkpoint(path: Path) -> CheckpointError:
    hint = "give a global_stepN folder of GPT-NeoX, or the folder that holds it"
    if (path / MANIFEST).is_file():
        hint = "this is a checkpoint of ours already: `load` takes the folder that holds it"
    elif (path / "config.json").is_file():
        hint = "this is a Hugging Face folder: tools/convert_from_hf.py"
    why = contents(path)
    if path.is_dir():
        why = f"neither layer_XX-model_YY-model_states.pt nor mp_rank_YY_model_states.pt is there; {why}"
    return CheckpointError("not a GPT-NeoX checkpoint", where=str(path), why=why, hint=hint)


class ForeignFolder:
    """One `global_stepN` folder of GPT-NeoX.

    Attributes:
        tp: tensor-parallel size it was saved with. stages: NeoX numbers of the stages that hold tensors.

    Raises:
        CheckpointError: no such files, or one of them is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._layers = self._numbered(_LAYER)
        self._whole: dict[int, list[dict[str, Tensor]]] = {}
        ranks = self._numbered(_RANK)
        if self._layers:
            found: dict[int, set[int]] = defaultdict(set)
            for stage, rank in self._layers:
                found[stage].add(rank)
            self.stages, self.tp = sorted(found), 1 + max(rank for _, rank in self._layers)
            self._bound(len(self._layers) // len(found))
            missing = [layer_name(s, r) for s in self.stages for r in range(self.tp) if r not in found[s]]
        elif ranks:
            self.tp = 1 + max(rank for (rank,) in ranks)
            self._bound(len(ranks))
            missing = [f"mp_rank_{r:02d}_model_states.pt" for r in range(self.tp) if (r,) not in ranks]
            if not missing:
                self._whole = self._split([ranks[(rank,)] for rank in range(self.tp)])
            self.stages = sorted(self._whole)
        else:
            raise _no_foreign_checkpoint(path)
        if missing:
            raise missing_files(path, missing)

    @property
    def by_layer(self) -> bool:
        """Whether each stage has files of its own."""
        return bool(self._layers)

    def iteration(self) -> int | None:
        """The step that the files themselves were saved at; None where none of them says."""
        file = self.path / "mp_rank_00_model_states.pt"
        body: Any = None
        with contextlib.suppress(CheckpointError):  # beside files of layers it is not needed, and may hold what is not opened
            body = read_pickle(file) if file.is_file() else None
        found = [body.get(key) for key in ("iteration", "global_steps")] if isinstance(body, Mapping) else []
        return next((int(step) for step in found if isinstance(step, int) and 0 <= step < 10**18), None)

    def _bound(self, there: int) -> None:
        """Refuse a rank in a file's name that is far beyond the number of files, before the others are counted."""
        if self.tp > max(1024, 2 * there):
            why = f"a file's name says tensor rank {self.tp - 1:,}, there are {there} files of a stage"
            raise CheckpointError("files of the checkpoint are missing", where=str(self.path), why=why)

    def _numbered(self, pattern: re.Pattern[str]) -> dict[tuple[int, ...], Path]:
        names = sorted(self.path.iterdir()) if self.path.is_dir() else []
        matches = ((pattern.fullmatch(file.name), file) for file in names)
        return {tuple(int(n) for n in match.groups()): file for match, file in matches if match}

    def _split(self, files: list[Path]) -> dict[int, list[dict[str, Tensor]]]:
        """`sequential.XX.key` of every tensor rank -> stage -> per rank: key -> tensor."""
        stages: dict[int, list[dict[str, Tensor]]] = defaultdict(lambda: [{} for _ in files])
        for rank, file in enumerate(files):
            body = read_pickle(file)
            module = body.get("module", body) if isinstance(body, dict) else None
            if not isinstance(module, dict):
                raise CheckpointError("the file holds no weights", where=str(file), why="`module` is not a state dict")
            for name, value in module.items():
                match = _SEQUENTIAL.fullmatch(str(name))
                if match and isinstance(value, Tensor):
                    stages[int(match[1])][rank][match[2]] = value
        return dict(stages)

    def stage(self, number: int) -> list[dict[str, Tensor]]:
        """Per tensor rank: key -> that rank's part."""
        if self._whole:
            return self._whole[number]
        return [self._state(self._layers[number, rank]) for rank in range(self.tp)]

    def _state(self, file: Path) -> dict[str, Tensor]:
        body = read_pickle(file)
        if not isinstance(body, Mapping):
            raise CheckpointError("the file is not a state dict", where=str(file), why=f"it holds a {type(body).__name__}")
        return {str(name): value for name, value in body.items() if isinstance(value, Tensor)}

    def config_files(self) -> Iterator[Path]:
        """The YAML files that rode along."""
        return iter(sorted((self.path / "configs").glob("*.y*ml")) if (self.path / "configs").is_dir() else [])
