"""Saving: every rank writes its own files into a temporary folder, rank 0 describes them and gives the folder its name.

An error on any rank (a full disk) ends as one CheckpointError on all of them, with the temporary folder removed and the
last good checkpoint and `latest` as they were. The order of renames is in `commit.py`.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import safetensors
import torch
from torch import Tensor

from megatron.checkpoint import commit
from megatron.checkpoint.agree import Verdict, exchange
from megatron.checkpoint.layout import tag_of
from megatron.checkpoint.manifest import Manifest, write_manifest
from megatron.checkpoint.receipts import take_receipts, write_receipt
from megatron.checkpoint.retention import retain
from megatron.checkpoint.shards import Holdings, add_weights, engine_holdings
from megatron.checkpoint.tensors import FileEntry, write_tensors
from megatron.engine.base import Engine
from megatron.errors import CheckpointError
from megatron.files import atomic_open, sha256_of, write_text
from megatron.parallel.mesh import Mesh
from megatron.parallel.plan import ParamSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Companions:
    """What rides along with the tensors.

    model_config: compared at load. config_texts: file name -> original YAML text, for `configs/`.
    tokenizer: file name -> path of a file to copy into `tokenizer/`. facts: anything JSON-able worth keeping
    (tokenizer type, fingerprint of the data).
    """

    model_config: Mapping[str, Any]
    config_texts: Mapping[str, str] = field(default_factory=dict)
    tokenizer: Mapping[str, str | Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: str | Path,
    engine: Engine,
    state: Mapping[str, Any],
    *,
    model_config: Mapping[str, Any],
    config_texts: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, str | Path] | None = None,
    facts: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
    keep: Collection[int] = (),
    save_optimizer: bool = True,
    save_rng: bool = True,
) -> Path:
    """Save a running engine; every rank must call this at the same step, with the same arguments.

    Args:
        folder: the save folder, shared by all nodes. state: the training state, JSON-able, with `iteration`.
        model_config, config_texts, tokenizer, facts: see `Companions`.
        keep_last: checkpoints to retain, None for all. keep: steps never deleted.

    Returns:
        `<folder>/global_step<iteration>`.

    Raises:
        CheckpointError: on all ranks, when any of them could not write; nothing that was whole before has changed.
    """
    companions = Companions(model_config, config_texts or {}, tokenizer or {}, facts or {})
    verdict = _verdict(Path(folder), state["iteration"])
    holdings = Holdings()
    with verdict.watch():
        holdings = engine_holdings(engine, save_optimizer=save_optimizer, save_rng=save_rng)
    verdict.settle()
    path = _write(Path(folder), holdings, engine.mesh, state, companions, engine.extra_state())
    if engine.mesh.rank == 0:
        for problem in retain(Path(folder), state["iteration"], keep_last, keep):
            _log.warning(problem)
    return path


def save_weights(
    folder: str | Path,
    weights: Mapping[str, Tensor],
    specs: Mapping[str, ParamSpec],
    *,
    model_config: Mapping[str, Any],
    iteration: int = 0,
    state: Mapping[str, Any] | None = None,
    config_texts: Mapping[str, str] | None = None,
    tokenizer: Mapping[str, str | Path] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Make a checkpoint of full weights without an engine (imports of other formats): one process, no optimizer state.

    Raises:
        CheckpointError: it cannot be written, or a shape differs from its spec.
    """
    holdings, verdict = Holdings(), _verdict(Path(folder), iteration)
    with verdict.watch():
        add_weights(holdings, weights, specs, Mesh.single())
    verdict.settle()
    companions = Companions(model_config, config_texts or {}, tokenizer or {}, facts or {})
    return _write(Path(folder), holdings, Mesh.single(), {**(state or {}), "iteration": iteration}, companions, {})


def _verdict(folder: Path, iteration: int) -> Verdict:
    return Verdict(f"the checkpoint of step {iteration} could not be saved; the earlier ones are untouched", str(folder))


def _write(
    folder: Path,
    holdings: Holdings,
    mesh: Mesh,
    state: Mapping[str, Any],
    companions: Companions,
    engine_state: Mapping[str, Any],
) -> Path:
    iteration, main = int(state["iteration"]), mesh.rank == 0
    offers = [json.loads(text) for text in exchange(json.dumps([commit.new_save_id(), holdings.size]))]
    save_id, verdict = offers[0][0], _verdict(folder, iteration)
    temporary = commit.temporary_folder(folder, iteration, save_id)
    try:
        with verdict.watch():
            if main:
                _prepare(folder, temporary, sum(size for _, size in offers))
        verdict.settle()
        with verdict.watch():
            files = _write_files(temporary, holdings, {"save_id": save_id, "iteration": str(iteration)})
            write_receipt(temporary, mesh.rank, holdings, files)
        verdict.settle()
        with verdict.watch():
            if main:
                _describe(temporary, mesh, save_id, state, companions, engine_state)
                commit.publish(temporary, iteration)
        verdict.settle()
    except BaseException:
        if main:
            commit.discard(temporary)
        raise
    return folder / tag_of(iteration)


def _prepare(folder: Path, temporary: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in commit.recover(folder):
        _log.warning("an interrupted save had left %s, cleared", folder / name)
    commit.check_space(folder, needed)
    temporary.mkdir()


def _write_files(temporary: Path, holdings: Holdings, header: Mapping[str, str]) -> dict[str, FileEntry]:
    return {name: write_tensors(temporary / name, tensors, header) for name, tensors in holdings.files.items()}


def _describe(
    temporary: Path,
    mesh: Mesh,
    save_id: str,
    state: Mapping[str, Any],
    companions: Companions,
    engine_state: Mapping[str, Any],
) -> None:
    """Rank 0: add the companions, join the receipts and write the manifest, last."""
    joined = take_receipts(temporary, mesh.world_size)
    joined.files.update(_copy_companions(temporary, companions))
    manifest = Manifest(
        iteration=int(state["iteration"]),
        save_id=save_id,
        mesh={"pp": mesh.pp, "dp": mesh.dp, "tp": mesh.tp},
        model_config=companions.model_config,
        state=state,
        engine=engine_state,
        facts=companions.facts,
        versions=_versions(),
        weights=joined.weights,
        optimizer=joined.optimizer,
        files=joined.files,
    )
    write_manifest(temporary, manifest)


def _copy_companions(temporary: Path, companions: Companions) -> dict[str, FileEntry]:
    written = []
    if companions.config_texts:
        (temporary / "configs").mkdir()
    for name, text in companions.config_texts.items():
        written.append(temporary / "configs" / Path(name).name)
        write_text(written[-1], text)
    if companions.tokenizer:
        (temporary / "tokenizer").mkdir()
    for name, source in companions.tokenizer.items():
        written.append(temporary / "tokenizer" / Path(name).name)
        try:
            with open(source, "rb") as original, atomic_open(written[-1]) as copy:
                shutil.copyfileobj(original, copy)
        except FileNotFoundError as error:
            raise CheckpointError("a tokenizer file is gone", where=str(source), why=str(error)) from error
    return {path.relative_to(temporary).as_posix(): FileEntry(path.stat().st_size, sha256_of(path)) for path in written}


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
    }
