"""Save and load on one process: bits, names, semantics of finetune and friends, where a run starts from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron.checkpoint.find import find_checkpoint
from megatron.checkpoint.layout import whole_steps
from megatron.checkpoint.load import load_checkpoint, read_full_weights, verify_checkpoint
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.retention import superfluous
from megatron.checkpoint.save import save_checkpoint, save_weights
from megatron.checkpoint.shard_contents import local_slice
from megatron.checkpoint.tensor_reader import Source
from megatron.errors import CheckpointError
from megatron.parallel.mesh import Mesh
from tests.checkpoint.fakes import MODEL, SPECS, FakeEngine, full, part

STATE = {"iteration": 7, "consumed_samples": 56}


def save(folder: Path, step: int = 7, seed: int = 1, **options: object) -> Path:
    """One checkpoint of a fake engine."""
    return save_checkpoint(folder, FakeEngine(seed=seed), {**STATE, "iteration": step}, model_config=MODEL, **options)  # type: ignore[arg-type]


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    path = save(tmp_path)
    engine = FakeEngine(seed=2)
    assert load_checkpoint(path, engine, model_config=MODEL) == STATE
    assert engine.same_as(FakeEngine(seed=1))
    assert not engine.refreshed


def test_the_folder_is_what_the_manual_says(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tok.json"
    tokenizer.write_text("{}")
    path = save(tmp_path / "s", config_texts={"a.yml": "x: 1\n", "b.yml": "y: 2\n"}, tokenizer={"tokenizer.json": tokenizer})
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    assert names == [
        "configs/a.yml",
        "configs/b.yml",
        "layer_00-model_00.safetensors",
        "layer_02-model_00.safetensors",
        "layer_03-model_00.safetensors",
        "manifest.json",
        "optim-dp0-pp0-tp0.safetensors",
        "rng-rank0.safetensors",
        "tokenizer/tokenizer.json",
    ]
    assert path.name == "global_step7"
    assert (tmp_path / "s" / "latest").read_text() == "global_step7"
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["global_step7", "latest"]
    manifest = verify_checkpoint(path)
    assert set(manifest.files) == set(names) - {"manifest.json"}
    assert dict(manifest.mesh) == {"pp": 1, "dp": 1, "tp": 1}


def test_the_library_reads_our_files(tmp_path: Path) -> None:
    path = save(tmp_path)
    layer = load_file(path / "layer_02-model_00.safetensors")
    for name, tensor in layer.items():
        assert torch.equal(tensor, full(name, 1).bfloat16())
    optimizer = load_file(path / "optim-dp0-pp0-tp0.safetensors")
    assert set(optimizer) == {f"{kind}/{name}" for name in SPECS for kind in ("master", "exp_avg", "exp_avg_sq")}


def test_random_numbers_go_on(tmp_path: Path) -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    np.random.randn(1)
    path = save(tmp_path)
    then = torch.rand(5).tolist(), random.random(), np.random.randn(3).tolist()
    load_checkpoint(path, FakeEngine())
    assert (torch.rand(5).tolist(), random.random(), np.random.randn(3).tolist()) == then
    torch.manual_seed(4)
    own = torch.rand(5).tolist()
    torch.manual_seed(4)
    load_checkpoint(path, FakeEngine(), load_rng=False)
    assert torch.rand(5).tolist() == own


def test_finetune_takes_weights_only(tmp_path: Path) -> None:
    path, engine = save(tmp_path), FakeEngine(seed=2)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert load_checkpoint(path, engine, finetune=True) == {}
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.same_as(FakeEngine(seed=1), optimizer=False)
    assert engine.refreshed
    assert engine.slices["model.scale"].step == 42
    assert engine.extra == FakeEngine(seed=2).extra


def test_no_load_optim_keeps_the_step(tmp_path: Path) -> None:
    path, engine = save(tmp_path), FakeEngine(seed=2)
    assert load_checkpoint(path, engine, load_optimizer=False)["iteration"] == 7
    assert engine.refreshed
    assert engine.slices["model.scale"].step == 42


def test_a_checkpoint_without_optimizer_says_so(tmp_path: Path) -> None:
    path = save(tmp_path, save_optimizer=False, save_rng=False)
    with pytest.raises(CheckpointError, match="no optimizer state(.|\n)*no_load_optim"):
        load_checkpoint(path, FakeEngine())
    load_checkpoint(path, FakeEngine(seed=2), load_optimizer=False)


def test_another_model_is_named_field_by_field(tmp_path: Path) -> None:
    path = save(tmp_path)
    other = {**MODEL, "hidden_size": 16, "layer_options": {"metala": {"k": 4}}, "norm": "rmsnorm"}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, FakeEngine(), model_config=other)
    text = str(caught.value)
    for piece in ("hidden_size is 8 in the checkpoint, 16 here", "layer_options.metala.k is 2", "norm is null"):
        assert piece in text


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_dropout", 0.1), ("mixer_init", "methods"), ("init_method", "small_init")]
)
def test_fields_that_do_not_change_the_function_may_differ(tmp_path: Path, field: str, value: object) -> None:
    """Also a field that the checkpoint, of an older version, does not have."""
    path = save(tmp_path)
    load_checkpoint(path, FakeEngine(), model_config={**MODEL, field: value})


def test_other_parameters_are_named(tmp_path: Path) -> None:
    path, engine = save(tmp_path), FakeEngine()
    engine.specs = {**SPECS, "lm_head.weight": SPECS["model.embed_tokens.weight"]}
    with pytest.raises(CheckpointError, match=r"1 are missing \(lm_head.weight\)"):
        load_checkpoint(path, engine)


def test_full_weights(tmp_path: Path) -> None:
    weights = read_full_weights(save(tmp_path))
    assert set(weights) == set(SPECS)
    assert all(torch.equal(weights[n], full(n, 1).bfloat16()) for n in SPECS)
    assert list(read_full_weights(tmp_path / "global_step7", ["model.scale"])) == ["model.scale"]
    with pytest.raises(CheckpointError, match="no weight 'nonsense'"):
        read_full_weights(tmp_path / "global_step7", ["nonsense"])


def test_a_rank_reads_its_share_of_the_bytes(tmp_path: Path) -> None:
    path = save(tmp_path)
    mesh = Mesh(1, 1, 4, 2)
    wanted = {
        "model.embed_tokens.weight": 64,
        "model.layers.0.token_mixer.q_proj.weight": 32,
        "model.layers.0.token_norm.weight": 16,
    }
    for name, size in wanted.items():
        with Source(path, read_manifest(path), verify=False) as source:
            found = list(source.tensors([source.wanted_weight(name, local_slice(SPECS[name], mesh))]))
            assert source.bytes_read == size  # bf16: a quarter of 128 and of 64 elements, all of 8
        assert torch.equal(found[0], part(name, full(name, 1), mesh).bfloat16())


def test_weights_alone_make_a_checkpoint(tmp_path: Path) -> None:
    weights = {name: full(name, 5) for name in SPECS}
    path = save_weights(tmp_path, weights, SPECS, model_config=MODEL, config_texts={"x.yml": ""}, facts={"from": "hf"})
    assert path.name == "global_step0"
    assert read_manifest(path).facts == {"from": "hf"}
    engine = FakeEngine(seed=2)
    assert load_checkpoint(path, engine, finetune=True) == {}
    again = read_full_weights(path)
    assert all(torch.equal(again[n], weights[n]) and again[n].dtype == torch.float32 for n in SPECS)
    with pytest.raises(CheckpointError, match="model.scale"):
        save_weights(tmp_path, {"model.scale": torch.zeros(3)}, SPECS, model_config=MODEL)


def test_find_latest_and_iteration(tmp_path: Path) -> None:
    first, second = save(tmp_path, 5), save(tmp_path, 9)
    assert find_checkpoint(tmp_path) == second
    assert find_checkpoint(tmp_path, 5) == first
    assert find_checkpoint(first) == first
    (tmp_path / "latest").write_text("global_step5\n")
    assert find_checkpoint(str(tmp_path)) == first
    (tmp_path / "latest").unlink()
    assert find_checkpoint(tmp_path) == second
    with pytest.raises(CheckpointError, match="step 6(.|\n)*global_step5, global_step9"):
        find_checkpoint(tmp_path, 6)


def test_a_wrong_load_is_an_error_and_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="does not exist; beside it: checkpoints"):
        find_checkpoint(tmp_path / "checkpoint", save_dir=tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="it holds: notes.txt"):
        find_checkpoint(tmp_path / "checkpoints", save_dir=tmp_path / "elsewhere")


def test_load_equal_to_save_starts_at_zero(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "new", save_dir=str(tmp_path / "x" / ".." / "new")) is None
    assert find_checkpoint(tmp_path, save_dir=tmp_path) is None
    (tmp_path / "global_step4.tmp-0123456789ab").mkdir()
    assert find_checkpoint(tmp_path, save_dir=tmp_path) is None
    with pytest.raises(CheckpointError):
        find_checkpoint(tmp_path, 4, save_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [("global_step99", "step 99"), ("hello", "'hello'"), ("", "''"), ("global_step7/../x", "expected")],
)
def test_latest_with_a_wrong_step(tmp_path: Path, content: str, says: str) -> None:
    save(tmp_path)
    (tmp_path / "latest").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(tmp_path, save_dir=tmp_path)
    assert says in str(caught.value)
    assert "global_step7" in str(caught.value)


def test_neox_folders_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    (tmp_path / "global_step3" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    (tmp_path / "latest").write_text("global_step3")
    with pytest.raises(CheckpointError, match="imported first"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="imported first"):
        read_full_weights(tmp_path / "global_step3")


def test_retention(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2, keep={1})
    assert sorted(whole_steps(tmp_path)) == [1, 3, 4]
    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "mine.txt").write_text("not a checkpoint of ours")
    save(tmp_path, 5, keep_last=1, keep={1})
    assert sorted(whole_steps(tmp_path)) == [1, 4, 5], "never fewer than two"
    assert (tmp_path / "global_step2" / "mine.txt").exists()


def test_retention_does_not_count_damaged_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    file = tmp_path / "global_step3" / "layer_02-model_00.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    save(tmp_path, 4, keep_last=2)
    assert sorted(whole_steps(tmp_path)) == [2, 3, 4], "step 2 stays because 3 cannot be used"
    assert "global_step3 is damaged" in caplog.text
    save(tmp_path, 5, keep_last=2)
    assert sorted(whole_steps(tmp_path)) == [4, 5]


@settings(max_examples=200)
@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 5), st.sets(st.integers(0, 30)), st.data())
def test_never_fewer_than_two_good_ones(steps: set[int], keep_last: int, keep: set[int], data: st.DataObject) -> None:
    written = data.draw(st.sampled_from(sorted(steps)))
    whole = {step: step == written or data.draw(st.booleans()) for step in steps}
    left = steps - set(superfluous(steps, written, keep_last, keep, whole))
    assert written in left and keep & steps <= left
    assert sum(whole[step] for step in left) >= min(2, sum(whole.values()))
    assert len(left) <= max(2, keep_last) + len(keep & steps) + 2


def test_retention_keeps_what_was_just_written_after_a_rewind(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 12, keep_last=2)
    assert sorted(whole_steps(tmp_path)) == [12, 20, 30]
    assert find_checkpoint(tmp_path) == tmp_path / "global_step12"


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, seed=1)
    path = save(tmp_path, seed=2)
    engine = FakeEngine(seed=3)
    load_checkpoint(path, engine)
    assert engine.same_as(FakeEngine(seed=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step7", "latest"]


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    body = json.loads((save(tmp_path, facts={"tokenizer": "byte"}) / "manifest.json").read_text())
    assert body["version"] == 2
    assert body["facts"] == {"tokenizer": "byte"}
    assert body["weights"]["model.layers.0.token_mixer.o_proj.weight"] == {
        "shape": [8, 8],
        "dtype": "bfloat16",
        "cut": "row",
        "stage": 2,
        "parts": [{"file": "layer_02-model_00.safetensors", "dim": 1, "start": 0, "stop": 8}],
    }
