"""tools/launch_eval.py: names, the plan, what counts as done; a real run that half fails, goes on, and becomes a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ConfigError, LaunchError
from tests.evaluation.tiny import tiny_config, trained_checkpoint, write_recall, write_standard
from tests.export.modules_cache import use_private_modules_cache
from tools import launch_eval as tool


def test_names(tmp_path: Path) -> None:
    for name in ("runs/a/checkpoints", "runs/b/checkpoints", "hf"):
        (tmp_path / name).mkdir(parents=True)
    found = tool.named([str(tmp_path / "runs/a/checkpoints"), f"mine={tmp_path / 'hf'}"])
    assert [(model.name, model.path) for model in found] == [("a", tmp_path / "runs/a/checkpoints"), ("mine", tmp_path / "hf")]
    with pytest.raises(ConfigError, match="two models are called 'x'"):
        tool.named([f"x={tmp_path}", f"x={tmp_path / 'hf'}"])
    with pytest.raises(ConfigError, match="no model folder"):
        tool.named([str(tmp_path / "absent")])


def test_plan_deals_tasks_out() -> None:
    models, tasks = [tool.Model("a", Path("a")), tool.Model("b", Path("b"))], ["t1", "t2", "t3"]
    alone = tool.plan(models, tasks, 1, {})
    assert [(job.model.name, job.tasks) for job in alone] == [("a", ("t1", "t2", "t3")), ("b", ("t1", "t2", "t3"))]
    wide = tool.plan(models, tasks, 4, {("b", "t1"): True, ("b", "t3"): True})
    assert [(job.model.name, job.tasks) for job in wide] == [("a", ("t1", "t3")), ("a", ("t2",)), ("b", ("t2",))]


def test_done_means_same_model_and_settings(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert not tool.is_done(file, {}, tmp_path)
    file.write_text(json.dumps({"settings": {"limit": 3}, "place": str(tmp_path)}))
    assert tool.is_done(file, {"limit": 3}, tmp_path)
    assert not tool.is_done(file, {"limit": 4}, tmp_path) and not tool.is_done(file, {"limit": 3}, tmp_path / "newer")
    file.write_text("{")
    assert not tool.is_done(file, {"limit": 3}, tmp_path)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert tool.devices(True, 9) == ["2", "5"] and tool.devices(False, 9) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(tool, "_has_smi", lambda: False)
    assert tool.devices(True, 3) == [None, None, None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    use_private_modules_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_a_run_that_half_fails_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.evaluation.published_tables import read_results
    from megatron.export.hf import export_checkpoint

    write_recall(write_standard(tmp_path / "data"))
    checkpoint = trained_checkpoint(tmp_path / "runs/tiny/checkpoints", tiny_config("metala"), steps=10)
    export_checkpoint(checkpoint, tmp_path / "hf")
    words = ["-m", str(tmp_path / "runs/tiny/checkpoints"), "--output", str(tmp_path / "out")]
    words += ["--data-dir", str(tmp_path / "data"), "--context-length", "150", "--limit", "2"]
    with pytest.raises(LaunchError, match="1 of 1 jobs failed"):  # there is no data for winogrande
        tool.launch(tool.parser().parse_args([*words, "-t", "piqa", "winogrande", "based_fda_twice", "-p", "--processes", "1"]))
    log = next((tmp_path / "out" / "logs").iterdir()).read_text()
    assert "task 'winogrande' cannot be read" in log and "Traceback" not in log
    assert {file.stem for file in (tmp_path / "out" / "tiny").iterdir()} == {"piqa", "based_fda_twice"}
    capsys.readouterr()
    tool.launch(tool.parser().parse_args([*words, "-t", "piqa", "based_fda_twice"]))
    assert "2 of 2 results are there; 0 jobs" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "tiny" / "based_fda_twice.json").read_text())
    assert written["recall"]["based_fda_twice"]["dropped"] == 1 and written["place"] == str(checkpoint)
    order: dict[str, Any] = {"name": "hf", "path": str(tmp_path / "hf"), "tasks": ["piqa", "based_fda_twice"]}
    order |= {"output": str(tmp_path / "out"), "imported": False}
    tool.work(order | {"settings": written["settings"], "data_dir": str(tmp_path / "data")})
    rows = {row.name: row.cells for row in read_results([tmp_path / "out"])}
    assert rows["tiny"] == pytest.approx(rows["hf"]) and set(rows["hf"]) == {"piqa", "based_fda_twice@150"}
    with pytest.raises(ConfigError, match="exported folder"):
        tool.work(order | {"settings": written["settings"] | {"prompt_mode": "left_pad"}, "data_dir": None})
