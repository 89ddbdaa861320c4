"""`tools/checkpoint.py`: what it prints, its exit codes, and what `reshard` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.find import newest_checkpoint
from megatron.checkpoint.load import load_checkpoint, verify_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.offline_reshard import reshard
from megatron.checkpoint.report import diff, inspect
from megatron.checkpoint.save import save_checkpoint
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.fakes import MODEL, FakeEngine
from tools import checkpoint as tool


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of one command."""
    monkeypatch.setattr("sys.argv", ["checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    return int(ended.value.code or 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """One checkpoint."""
    state = {"iteration": 7, "consumed_samples": 56}
    texts = {"a.yml": "x: 1\n"}
    return save_checkpoint(tmp_path / "a", FakeEngine(), state, model_config=MODEL, config_texts=texts)


def test_inspect(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "inspect", path.parent) == 0
    page = capsys.readouterr().out
    for text in (
        "step 7",
        "pp 1 x dp 1 x tp 1",
        "6 tensors, 269 parameters, bfloat16",
        "exp_avg, exp_avg_sq",
        '"consumed_samples": 56',
    ):
        assert text in page
    assert "q_proj" not in page
    assert "model.layers.0.token_mixer.q_proj.weight  bfloat16  8 x 8  column  stage 2  1 parts" in inspect(path, tensors=True)


def test_verify(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    second = save_checkpoint(path.parent, FakeEngine(), {"iteration": 9}, model_config=MODEL)
    assert run(monkeypatch, "verify", path.parent) == 0
    file = path / "layer_02-model_00.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (path / "rng-rank0.safetensors").unlink()
    capsys.readouterr()
    assert run(monkeypatch, "verify", path.parent) == 4
    said = capsys.readouterr().out
    assert f"{path}: damaged" in said and f"{second}: whole" in said
    assert "layer_02-model_00.safetensors: 'model.layers.0." in said and "rng-rank0.safetensors: missing" in said


def test_diff(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    engine.slices["model.scale"].moments["exp_avg"] += 1
    with torch.no_grad():
        engine.parameters()["model.layers.0.token_norm.weight"][3] = 5.0
    other = save_checkpoint(path.parents[1] / "b", engine, {"iteration": 8}, model_config={**MODEL, "hidden_size": 9})
    lines = list(diff(path, other))
    assert [line.split(":")[0] for line in lines] == [
        "state",
        "state",
        "model_config",
        "model.layers.0.token_norm.weight weight",
        "model.scale exp_avg",
    ]
    assert "1 of 8 elements" in lines[3]
    assert run(monkeypatch, "diff", path, other) == 1
    assert run(monkeypatch, "diff", path, path) == 0
    assert "equal, bitwise" in capsys.readouterr().out


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2), (1, 4, 1), (2, 1, 4)], ids=str)
def test_reshard_there_and_back(path: Path, mesh: tuple[int, int, int], tmp_path: Path) -> None:
    pp, dp, tp = mesh
    # one block cannot fill two pipeline stages
    made = reshard(path, tmp_path / "new", pp=1 if pp > 1 else pp, dp=dp, tp=tp)
    manifest = verify_checkpoint(made)
    assert dict(manifest.mesh) == {"pp": 1, "dp": dp, "tp": tp}
    assert list(diff(path, made)) == []
    assert (made / "configs" / "a.yml").read_text() == "x: 1\n"
    for rank in range(dp * tp):
        engine = FakeEngine(Mesh(1, dp, tp, rank), 2)
        assert load_checkpoint(made, engine, load_rng=False)["consumed_samples"] == 56
        assert engine.same_as(FakeEngine(Mesh(1, dp, tp, rank), 1))
    back = reshard(made, tmp_path / "back", pp=1, dp=1, tp=1)
    assert list(diff(path, back)) == []
    layers = sorted(p.name for p in path.glob("layer*"))
    assert [(back / name).read_bytes()[-64:] for name in layers] == [(path / name).read_bytes()[-64:] for name in layers]
    assert ("rng-rank0.safetensors" in read_manifest(made).files) == (dp == 1)


def test_reshard_refuses(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be cut for tensor size 3"):
        reshard(path, tmp_path / "new", pp=1, dp=1, tp=3)
    with pytest.raises(CheckpointError, match="own save folder"):
        reshard(path, path.parent, pp=1, dp=1, tp=2)
    file = path / "layer_02-model_00.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        reshard(path, tmp_path / "new", pp=1, dp=1, tp=2)
    assert not list((tmp_path / "new").iterdir())


def test_a_run_folder_means_its_newest_checkpoint(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    later = save_checkpoint(path.parent, FakeEngine(), {"iteration": 9, "consumed_samples": 72}, model_config=MODEL)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    path.parent.rename(run_folder / "checkpoints")
    newest = run_folder / "checkpoints" / later.name
    for asked in (run_folder, run_folder / "checkpoints", newest):
        assert newest_checkpoint(asked) == newest
        assert run(monkeypatch, "inspect", asked) == 0
        assert "step 9" in capsys.readouterr().out
    assert run(monkeypatch, "verify", run_folder) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{newest.with_name(name)}: whole" for name in ("global_step7", "global_step9")
    ]
    assert run(monkeypatch, "diff", run_folder, newest) == 0
    (newest.parent / "latest").write_text("global_step7")
    assert newest_checkpoint(run_folder).name == "global_step7", "as `latest` says"


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_what_is_no_checkpoint_is_said(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.yml").touch()
    for asked, why in (
        (tmp_path, "it holds: some.yml"),
        (tmp_path / "none", "does not exist; beside it: some.yml"),
        (tmp_path / "some.yml", "this is a file"),
    ):
        assert run(monkeypatch, command, asked) == 4
        said = capsys.readouterr().err
        assert "holds none" in said and why in said and "RUN/checkpoints takes the newest" in said
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert run(monkeypatch, command, tmp_path) == 4
    assert "tools/convert_from_hf.py" in capsys.readouterr().err
