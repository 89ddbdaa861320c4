"""docs/neox.md and docs/keys.md are fresh; the recorded facts of GPT-NeoX's files agree with the catalog and with the files.

The files are not part of this project; what they say, as GPT-NeoX's own reader gave it, is among the golden files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import neox_files
from megatron.config.catalog import catalog
from megatron.config.frozen import thaw
from megatron.config.pages import ROOT, keys_page, neox_page
from megatron.config.schema import RunConfig
from megatron.config.yaml_reader import normalise_key
from megatron.errors import ConfigError

STALE = "run: make docs"
FACTS = {fact["file"]: fact for fact in neox_files.facts()}
NOT_BUILT = (
    "Transformer Engine",
    "mixture of experts",
    "optimizer's rounding",
    "sparse attention",
    "tensorboard_dir or use_wandb",
)


def test_pages_are_fresh() -> None:
    assert (ROOT / "docs" / "neox.md").read_text(encoding="utf-8") == neox_page(), STALE
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == keys_page(), STALE


def test_every_key_stands_on_the_page_of_keys_under_its_status() -> None:
    parts = dict(zip(("implemented", "alias", "ignored", "refused", "values"), keys_page().split("\n## ")[1:], strict=True))
    for info in catalog().values():
        assert f"`{info.name}`" in parts[info.status], info.name
        assert all(
            f"\n| `{info.name}` |" not in parts[other] for other in ("alias", "ignored", "refused") if other != info.status
        )


def test_there_are_59_files_and_they_are_started_with_known_ones() -> None:
    assert len(FACTS) == 59
    for fact in FACTS.values():
        assert set(fact["with"]) <= set(FACTS) - {fact["file"]} and fact["with"] == neox_files.partners(fact["file"])


@pytest.mark.parametrize("name", sorted(name for name, fact in FACTS.items() if fact["accepted"]))
def test_keys_of_accepted_files_have_the_recorded_status(name: str) -> None:
    fact = FACTS[name]
    for key in fact["keys"]:
        info = catalog()[normalise_key(key)]
        if info.status == "refused" and info.origin != "older NeoX" and key != "deepspeed_extra_args":
            assert key in fact["at default"], f"{key} of {name} is refused now"
    assert all(catalog()[key].status == "ignored" for key in fact["ignored"])


@pytest.mark.parametrize("name", sorted(name for name, fact in FACTS.items() if not fact["accepted"]))
def test_refused_files_are_refused_for_the_recorded_reasons(name: str, load_values: Callable[..., RunConfig]) -> None:
    """The deciding keys alone, in a small run, are refused in the same words; each for a feature that is not built here."""
    fact = FACTS[name]
    deciding = {**fact["deciding"]}
    if "attention_config" in deciding:
        deciding["attention_config"] = [[deciding["attention_config"][0][0], "all"]]
    with pytest.raises(ConfigError) as caught:
        load_values({**deciding, **({"num_layers": 4} if "attention_config" in deciding else {})})
    refusals = [what for what, _ in neox_files.reasons(caught.value)]
    for what, hint in fact["why"]:
        assert what in refusals
        assert "is not built" in what or any(word in hint for word in NOT_BUILT), (what, hint)


def test_the_facts_are_those_of_the_recorded_files(golden: Callable[[str], Any]) -> None:
    values = {entry["file"]: entry["parsed"] for entry in golden("configs_parsed/parsed.json")}
    assert neox_files.judge(values) == list(FACTS.values()), STALE


def test_the_command_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one folder is needed"):
        neox_files.main([])
    with pytest.raises(ConfigError, match="there are no YAML files"):
        neox_files.main([str(tmp_path)])


def test_a_file_is_judged_by_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(neox_files, "FACTS", tmp_path / "facts.json")
    neox_files.FACTS.write_text('[{"file": "a.yml", "with": []}, {"file": "b.yml", "with": ["a.yml"]}]')
    assert neox_files.partners("c.yml") == ["local_setup.yml"]
    configs = tmp_path / "configs"
    configs.mkdir()
    shape = "num-layers: 2\nhidden-size: 8\nnum-attention-heads: 2\nseq-length: 8\ntrain-iters: 1\nbatch-size: 1\n"
    (configs / "a.yml").write_text(shape + "steps_per_print: 5\nmoe_num_experts: 1\n")
    (configs / "b.yml").write_text("moe_top_k: 2\nseq_length: 16\n")
    neox_files.main([str(configs)])
    assert "2 files, 1 accepted, 1 refused" in capsys.readouterr().out
    good, bad = neox_files.facts()
    assert good["accepted"] and good["ignored"] == ["steps_per_print"] and good["at default"] == ["moe_num_experts"]
    assert not bad["accepted"] and bad["why"][0][0].startswith("the key seq_length is given twice") and bad["deciding"] == {}
    assert thaw(bad["with"]) == ["a.yml"]
