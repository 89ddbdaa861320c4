"""Import of GPT-NeoX folders: both layouts, any tensor size, the MLP's swapped names, hostile and broken files."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.checkpoint.load import read_full_weights
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from megatron.errors import CheckpointError
from megatron.interop.neox import read_neox_weights, vocabulary_rows
from megatron.interop.neox_files import ForeignFolder, read_pickle
from megatron.model.build import param_specs
from megatron.model.config import ModelConfig
from tests.checkpoint.fakes import MODEL, FakeEngine
from tests.commands import run_here

ROOT = Path(__file__).parents[2]
CONFIG = ModelConfig(32, 16, 2, 2, 24, ("metala", "metala"), norm="rmsnorm", tie_embeddings=False)
# Our name in a block -> (NeoX's key, the dimension its tensor ranks cut), copied from the table of the original.
BLOCK: dict[str, tuple[str, int | None]] = {
    "token_norm.weight": ("input_layernorm.scale", None),
    "channel_norm.weight": ("post_attention_layernorm.scale", None),
    "token_mixer.conv1d.weight": ("attention.conv1d.weight", None),
    "token_mixer.q_proj.weight": ("attention.q_proj.weight", 0),
    "token_mixer.k_gate.weight": ("attention.k_gate.weight", 0),
    "token_mixer.v_proj.weight": ("attention.v_proj.weight", 0),
    "token_mixer.g_proj.weight": ("attention.g_proj.weight", 0),
    "token_mixer.g_proj.bias": ("attention.g_proj.bias", 0),
    "token_mixer.aug_balance": ("attention.aug_balance", None),
    "token_mixer.out_proj.weight": ("attention.out_proj.weight", 1),
    "channel_mixer.l1.weight": ("mlp.w1.weight", 0),
    "channel_mixer.l2.weight": ("mlp.w3.weight", 0),
    "channel_mixer.l3.weight": ("mlp.w2.weight", 1),
}


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Full weights, each of its own."""
    return {
        n: torch.randn(s.shape, generator=torch.Generator().manual_seed(i))
        for i, (n, s) in enumerate(param_specs(config).items())
    }


def neox_stages(config: ModelConfig, weights: Mapping[str, Tensor], tp: int) -> dict[int, list[dict[str, Tensor]]]:
    """NeoX's view: stage -> per tensor rank: key -> tensor."""
    last = config.num_layers + 4

    def cut(tensor: Tensor, dim: int | None) -> list[Tensor]:
        return [tensor] * tp if dim is None else list(tensor.chunk(tp, dim))

    rows: list[tuple[int, str, list[Tensor]]] = [(0, "word_embeddings.weight", cut(weights["model.embed_tokens.weight"], 0))]
    for i in range(config.num_layers):
        rows += [(i + 2, key, cut(weights[f"model.layers.{i}.{name}"], dim)) for name, (key, dim) in BLOCK.items()]
    rows.append((last - 1, "norm.scale", cut(weights["model.final_norm.weight"], None)))
    tied = weights["model.embed_tokens.weight"]
    key = "word_embeddings.weight" if config.tie_embeddings else "final_linear.weight"
    rows.append((last, key, cut(weights.get("lm_head.weight", tied), 0)))
    stages: dict[int, list[dict[str, Tensor]]] = {}
    for stage, key, parts in rows:
        for rank, part in enumerate(parts):
            stages.setdefault(stage, [{} for _ in range(tp)])[rank][key] = part.clone()
    return stages


def write_layers(folder: Path, stages: Mapping[int, list[dict[str, Tensor]]]) -> Path:
    """The layout of pipeline size 1 and more."""
    path = folder / "global_step40"
    path.mkdir()
    for stage, parts in stages.items():
        for rank, part in enumerate(parts):
            torch.save(part, path / f"layer_{stage:02d}-model_{rank:02d}-model_states.pt")
    torch.save({"module": None}, path / "mp_rank_00_model_states.pt")
    return path


def write_ranks(folder: Path, stages: Mapping[int, list[dict[str, Tensor]]]) -> Path:
    """The layout of pipeline size 0, with the random states that ride along."""
    path = folder / "global_step40"
    path.mkdir()
    for rank in range(len(stages[0])):
        module = {f"sequential.{stage}.{key}": t for stage, parts in stages.items() for key, t in parts[rank].items()}
        extra = {"iteration": 40, "np_rng_state": np.random.get_state(), "args": {"num_layers": 2}}
        torch.save({"module": module, "dp_world_size": 1, **extra}, path / f"mp_rank_{rank:02d}_model_states.pt")
    return path


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("write", [write_layers, write_ranks], ids=["pp1", "pp0"])
def test_weights_come_in(tmp_path: Path, tp: int, write: Callable[..., Path]) -> None:
    weights = random_weights(CONFIG)
    path = write(tmp_path, neox_stages(CONFIG, weights, tp))
    found = read_neox_weights(path, CONFIG)
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    folder = ForeignFolder(path)
    assert (folder.tp, vocabulary_rows(folder)) == (tp, 32)


def test_tied_embeddings(tmp_path: Path) -> None:
    config = ModelConfig(32, 16, 2, 2, 24, ("metala", "metala"), norm="rmsnorm", tie_embeddings=True)
    weights = random_weights(config)
    found = read_neox_weights(write_layers(tmp_path, neox_stages(config, weights, 2)), config)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert "lm_head.weight" not in found


def test_fused_gated_mlp_of_newer_releases(tmp_path: Path) -> None:
    weights, stages = random_weights(CONFIG), neox_stages(CONFIG, random_weights(CONFIG), 2)
    for stage in (2, 3):
        for part in stages[stage]:
            part["mlp.linear1.weight"] = torch.cat([part.pop("mlp.w3.weight"), part.pop("mlp.w1.weight")])
            part["mlp.linear2.weight"] = part.pop("mlp.w2.weight")
    found = read_neox_weights(write_layers(tmp_path, stages), CONFIG)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def change(stages: dict[int, list[dict[str, Tensor]]], what: str) -> None:
    """One mistake."""
    first = stages[2]
    if what == "missing":
        for part in first:
            del part["attention.k_gate.weight"]
    elif what == "extra":
        for part in first:
            part["attention.dense.bias"] = torch.zeros(16)
    elif what == "size":
        for part in first:
            part["mlp.w1.weight"] = torch.zeros(5, 16)
    else:
        first[1]["attention.aug_balance"] = first[1]["attention.aug_balance"] + 1


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "k_gate.weight' is not in the checkpoint(.|\n)*stage 02"),
        ("extra", "stage 02 holds tensors(.|\n)*attention.dense.bias"),
        ("size", "l1.weight' has another size"),
        ("differ", "aug_balance' cannot be merged(.|\n)*differ between the tensor ranks"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, what: str, says: str) -> None:
    stages = neox_stages(CONFIG, random_weights(CONFIG), 2)
    change(stages, what)
    with pytest.raises(CheckpointError, match=says):
        read_neox_weights(write_layers(tmp_path, stages), CONFIG)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = write_layers(tmp_path, neox_stages(CONFIG, random_weights(CONFIG), 2))
    (path / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="layer_03-model_01"):
        ForeignFolder(path)
    with pytest.raises(CheckpointError, match="not a GPT-NeoX checkpoint"):
        ForeignFolder(tmp_path)


class Hostile:
    """Runs a command when it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("place", ["value", "optimizer"])
def test_hostile_pickles_are_named_and_not_run(tmp_path: Path, place: str) -> None:
    mark = tmp_path / "ran"
    file = tmp_path / "layer_00-model_00-model_states.pt"
    torch.save({"word_embeddings.weight": Hostile(mark)} if place == "value" else [torch.zeros(1), Hostile(mark)], file)
    with pytest.raises(CheckpointError, match=r"was not run(.|\n)*mkdir"):
        read_pickle(file)
    assert not mark.exists()


def test_files_of_an_old_torch(tmp_path: Path) -> None:
    file = tmp_path / "layer_00-model_00-model_states.pt"
    torch.save({"a": torch.arange(5.0)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickle(file)["a"], torch.arange(5.0))
    mark = tmp_path / "ran"
    torch.save([torch.zeros(1), Hostile(mark)], file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"was not run(.|\n)*mkdir"):
        read_pickle(file)
    assert not mark.exists()


def test_broken_pickles(tmp_path: Path) -> None:
    file = tmp_path / "layer_00-model_00-model_states.pt"
    torch.save({"a": torch.zeros(100)}, file)
    data = file.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            read_pickle(file)


def add_config(path: Path, **changes: object) -> None:
    """The YAML that rides along."""
    (path / "configs").mkdir()
    lines = [
        "num_layers: 2",
        "hidden_size: 16",
        "num_attention_heads: 2",
        "seq_length: 8",
        "max_position_embeddings: 8",
        'attention_config: [[["metala"], 2]]',
        "norm: rmsnorm",
        "pos_emb: none",
        "activation: silu",
        "mlp_branch_size: 24",
        "mlp_type: llama",
        "no_weight_tying: true",
        "model_parallel_size: 2",
    ]
    lines = [line for line in lines if line.partition(":")[0] not in changes]
    lines += [f"{key}: {json.dumps(value)}" for key, value in changes.items()]
    (path / "configs" / "model.yml").write_text("\n".join(lines) + "\n")


def imported(path: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return run_here("tools/checkpoint.py", "import", path, "--output", out)


def test_the_command(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    path = write_ranks(tmp_path, neox_stages(CONFIG, weights, 2))
    add_config(path)
    out = tmp_path / "out"
    for place in (path, path.parent):  # the folder of the checkpoints means the newest; an import may be made again
        done = imported(place, out)
        assert done.returncode == 0, done.stderr
        found = read_full_weights(out / "global_step40")
        assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("write", [write_layers, write_ranks], ids=["pp1", "pp0"])
def test_the_step_is_that_of_the_files(write: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever the folder is called; a folder of layers says it in the file beside them, or only by its name."""
    path = write(tmp_path, neox_stages(CONFIG, random_weights(CONFIG), 2))
    add_config(path)
    if write is write_layers:
        torch.save({"module": None, "global_steps": 40}, path / "mp_rank_00_model_states.pt")
    renamed = path.rename(tmp_path / "global_step70")
    done = imported(renamed, tmp_path / "a")
    assert f"the files of {renamed} were saved at step 40" in done.stdout and (tmp_path / "a" / "global_step40").is_dir()
    done = imported(renamed.rename(tmp_path / "weights"), tmp_path / "b")
    assert done.returncode == 0 and (tmp_path / "b" / "latest").read_text() == "global_step40", done.stderr


def test_an_import_is_not_mixed_with_the_checkpoints_of_a_run(tmp_path: Path) -> None:
    path = write_layers(tmp_path, neox_stages(CONFIG, random_weights(CONFIG), 2))
    add_config(path)
    for step in (40, 90):
        out = tmp_path / f"run{step}"
        state = {"iteration": step, "consumed_samples": 8}
        save_checkpoint(out, FakeEngine(), state, SaveOptions(model_config=MODEL))
        done = imported(path, out)
        assert done.returncode == 4 and "the output folder holds checkpoints already" in done.stderr
        assert f"it holds: global_step{step}" in done.stderr and "--output: a folder that is new" in done.stderr
        assert [p.name for p in sorted(out.iterdir())] == [f"global_step{step}", "latest"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: (path / "layer_03-model_00-model_states.pt").unlink(), "layer_03-model_00-model_states.pt"),
        (lambda path: [p.unlink() for p in path.glob("layer_03-*")], "layer_03-model_00-model_states.pt, layer_03-model_01"),
        (lambda path: (path / "layer_03-model_01-model_states.pt").write_bytes(b""), "the file is empty"),
        (lambda path: (path / "layer_03-model_01-model_states.pt").write_bytes(b"vnothing"), "the file is damaged"),
        (lambda path: (path / "layer_03-model_01-model_states.pt").write_bytes(b"PK\3\4" * 99), "the file cannot be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_no_matter_of_the_config(
    damage: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    path = write_layers(tmp_path, neox_stages(CONFIG, random_weights(CONFIG), 2))
    add_config(path)
    damage(path)
    done = imported(path, tmp_path / "out")
    assert done.returncode == 4 and says in done.stderr and "layer_03" in done.stderr, done.stderr
    assert "from where the checkpoint was made" in done.stderr and "attention_config" not in done.stderr
    assert "more than tensors" not in done.stderr and not (tmp_path / "out" / "latest").exists()


def test_layers_that_the_config_has_alone_are_no_damage_for_sure(tmp_path: Path) -> None:
    path = write_layers(tmp_path, neox_stages(CONFIG, random_weights(CONFIG), 1))
    add_config(path, num_layers=3, attention_config=[[["metala"], 3]])
    done = imported(path, tmp_path / "out")
    assert done.returncode == 4 and "num_layers of the config, 3, is not that of the checkpoint" in done.stderr


def test_a_folder_that_is_none_of_neox_is_told_what_it_is(tmp_path: Path) -> None:
    ours = save_checkpoint(tmp_path / "run", FakeEngine(), {"iteration": 5}, SaveOptions(model_config=MODEL))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for path, says in (
        (ours, "this is a checkpoint of ours already"),
        (tmp_path / "run", "this is a checkpoint of ours already"),
        (tmp_path / "hf", "tools/convert_from_hf.py"),
        (tmp_path / "nowhere", "the folder does not exist"),
        (tmp_path, "give a global_stepN folder of GPT-NeoX, or the folder that holds it"),
    ):
        done = imported(path, tmp_path / "out")
        assert done.returncode == 4 and "not a GPT-NeoX checkpoint" in done.stderr and says in done.stderr, done.stderr
