"""Names inside a save folder, in one place, because saving, loading, retention and the tools must agree on them.

<save>/latest                                     text: the tag of the newest checkpoint, as in GPT-NeoX
<save>/global_step<N>/                            one complete checkpoint
    layer_<XX>-model_<YY>.safetensors             weights of stage XX held by tensor-parallel rank YY (NeoX's stem)
    optim-dp<D>-pp<P>-tp<T>.safetensors           optimizer slices that this rank owns
    rng-rank<R>.safetensors                       random number generator states of one rank
    configs/  tokenizer/                          the files the run was started with
    manifest.json                                 written last; without it the folder is not a checkpoint
<save>/global_step<N>.tmp-<id>                    being written
<save>/global_step<N>.old-<id>                    set aside while the same step is written again
<save>/global_step<N>.trash-<id>                  being deleted
"""

from __future__ import annotations

import os
import re
from pathlib import Path

LATEST = "latest"
MANIFEST = "manifest.json"
RNG = "rng-rank"
# No leading zeros (two folders would name one step), ASCII digits only, at most 18 (they fit int64).
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_STEP = re.compile(rf"global_step{_NUMBER}")
_LEFTOVER = re.compile(rf"global_step{_NUMBER}\.(tmp|old|trash)-[0-9a-z]+")
_LAYER_FILE = re.compile(r"layer_[0-9]{2,}-model_([0-9]{2,})\.safetensors")


def tag_of(iteration: int) -> str:
    """`global_step<iteration>`, the name of a checkpoint's folder and the content of `latest`."""
    return f"global_step{iteration}"


def iteration_of(tag: str) -> int | None:
    """The step of a tag; None if the text is not a tag."""
    match = _STEP.fullmatch(tag)
    return int(match[1]) if match else None


def layer_file(stage: int, tp_rank: int) -> str:
    """File of one stage's weights; at least two digits, as in NeoX."""
    return f"layer_{stage:02d}-model_{tp_rank:02d}.safetensors"


def tp_rank_of(file: str) -> int | None:
    """The tensor-parallel rank in the name of a `layer_file`; None for any other file."""
    match = _LAYER_FILE.fullmatch(file)
    return int(match[1]) if match else None


def optimizer_file(dp_rank: int, pp_rank: int, tp_rank: int) -> str:
    """File of the optimizer slices that one rank owns."""
    return f"optim-dp{dp_rank}-pp{pp_rank}-tp{tp_rank}.safetensors"


def rng_file(rank: int) -> str:
    """File of one rank's random number generator states."""
    return f"{RNG}{rank}.safetensors"


def shard_manifest_file(rank: int) -> str:
    """What one rank wrote, for rank 0 to merge into the manifest; removed before the checkpoint gets its name."""
    return f"receipt-rank{rank}.json"


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def step_folders(folder: Path) -> dict[int, Path]:
    """step -> folder, ascending, of every folder named like a checkpoint; its content is not checked."""
    steps = {iteration_of(name): folder / name for name in _names(folder)}
    return {step: steps[step] for step in sorted(step for step in steps if step is not None) if steps[step].is_dir()}


def complete_steps(folder: Path) -> dict[int, Path]:
    """The `step_folders` that have a manifest, which is written last."""
    return {step: path for step, path in step_folders(folder).items() if (path / MANIFEST).is_file()}


def leftover_folders(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """(step, folder) of what an interrupted save left behind, of one kind: tmp | old | trash."""
    matches = [(_LEFTOVER.fullmatch(name), name) for name in _names(folder)]
    return [(int(match[1]), folder / name) for match, name in matches if match and match[2] == kind]


def contents(folder: Path, limit: int = 12) -> str:
    """One line that lists the content of `folder`, for error messages."""
    if not os.path.lexists(folder):
        siblings = [p.name for p in sorted(folder.parent.iterdir())] if folder.parent.is_dir() else []
        return f"the folder does not exist; its parent holds: {', '.join(siblings[:limit]) or 'nothing'}"
    if not folder.is_dir():
        return "this is a broken link" if folder.is_symlink() and not folder.exists() else "this is a file, not a folder"
    steps = list(step_folders(folder).values())
    names = [p.name for p in steps] or _names(folder)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"it holds: {', '.join(names[-limit:]) or 'nothing'}{more}"
