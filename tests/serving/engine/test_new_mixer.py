"""A mixer that `tools/layer.py new` has just written is exported and served, and no file of ours knows of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from string import Template

import pytest

from megatron import registry
from tests.serving.engine.folders import SHAPES, make_folder, prompts, trainer_answers
from tests.serving.engine.serve import engine, greedy, tokens

ROOT = Path(__file__).resolve().parents[3]
NAME = "mixer_of_tomorrow"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The template's text as a package of somebody else, found by its entry point."""
    text = Template((ROOT / "tools/layer_templates/mixer.py.in").read_text(encoding="utf-8"))
    site = tmp_path / "site"
    (site / f"{NAME}-1.0.dist-info").mkdir(parents=True)
    (site / f"{NAME}.py").write_text(text.substitute(name=NAME, class_name="Tomorrow", title="Tomorrow"), encoding="utf-8")
    (site / f"{NAME}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    (site / f"{NAME}-1.0.dist-info" / "entry_points.txt").write_text(f"[megatron.layers]\n{NAME} = {NAME}\n")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    registry._table.cache_clear()
    yield
    registry._table.cache_clear()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("layers", [(NAME, NAME), (NAME, "global", "metala")], ids=["alone", "hybrid"])
def test_a_new_mixer_is_served_without_an_edit(tmp_path: Path, layers: tuple[str, ...]) -> None:
    shape = replace(SHAPES["metala"], layer_types=layers, num_layers=len(layers))
    served, given = make_folder(tmp_path, "new", shape), prompts(shape.vocab_size)[::2]
    with engine(served, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        answers = tokens(greedy(llm, given, 64))
    assert answers == trainer_answers(served, given, 64)
