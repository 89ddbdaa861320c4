"""A checkpoint of a tensor x pipeline run exports to the same bytes as one of a single process with the same weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.checkpoint.load import read_full_weights
from megatron.export.hf import export_checkpoint
from megatron.interop.import_hf import import_folder
from tests.export.conftest import TINY
from tests.export.native_ranks import save_run
from tests.parallel.ranks import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_export_does_not_depend_on_the_mesh(tmp_path: Path, tied: bool) -> None:
    config = replace(TINY, tie_embeddings=tied)
    alone = save_run(str(tmp_path / "one"), "single", 1, 1, config)
    together = run_ranks(save_run, 4, str(tmp_path / "four"), "deepspeed", 2, 2, config, timeout=120)[0]
    first = export_checkpoint(alone, tmp_path / "hf_one").folder
    second = export_checkpoint(together, tmp_path / "hf_four").folder
    assert json.loads((Path(together) / "manifest.json").read_text())["mesh"] == {"pp": 2, "dp": 1, "tp": 2}
    names = {p.name for p in first.iterdir()}
    assert names == {p.name for p in second.iterdir()}
    for name in names - {"README.md"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    back = read_full_weights(import_folder(second, tmp_path / "back").checkpoint)
    assert len(back["model.embed_tokens.weight"]) == 60 and ("lm_head.weight" in back) is not tied
