"""A checkpoint of a tensor x pipeline run exports to the same bytes as one of a single process with the same weights."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.checkpoint.load import read_full_weights
from megatron.checkpoint.save import save_checkpoint
from megatron.engine.base import EngineSettings
from megatron.engine.build import build_engine
from megatron.export.hf import export_checkpoint
from megatron.interop.import_hf import import_folder
from megatron.parallel.mesh import Mesh
from tests.export.conftest import TINY
from tests.parallel.ranks import run_ranks


def save_run(folder: str, kind: str, pp: int, tp: int, tied: bool) -> str:
    """Build an engine on this rank (weights do not depend on the mesh) and save it."""
    config = replace(TINY, tie_embeddings=tied)
    mesh = Mesh.create(pp, tp, pp * tp, int(os.environ.get("RANK", "0"))) if pp * tp > 1 else Mesh.single()
    engine = build_engine(kind, config, mesh, EngineSettings(seq_length=16, zero_stage=1), 0)
    facts = {"tokenizer": {"vocab_size": 60, "eod": 0, "pad": 0}}
    try:
        return str(save_checkpoint(folder, engine, {"iteration": 3}, model_config=config.to_dict(), facts=facts))
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_export_does_not_depend_on_the_mesh(tmp_path: Path, tied: bool) -> None:
    alone = save_run(str(tmp_path / "one"), "single", 1, 1, tied)
    together = run_ranks(save_run, 4, str(tmp_path / "four"), "deepspeed", 2, 2, tied, timeout=120)[0]
    first = export_checkpoint(alone, tmp_path / "hf_one").folder
    second = export_checkpoint(together, tmp_path / "hf_four").folder
    assert json.loads((Path(together) / "manifest.json").read_text())["mesh"] == {"pp": 2, "dp": 1, "tp": 2}
    names = {p.name for p in first.iterdir()}
    assert names == {p.name for p in second.iterdir()}
    for name in names - {"README.md"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    back = read_full_weights(import_folder(second, tmp_path / "back").checkpoint)
    assert len(back["model.embed_tokens.weight"]) == 60 and ("lm_head.weight" in back) is not tied
