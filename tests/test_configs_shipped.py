"""Every shipped YAML starts: model files beside the site file, complete runs alone; model files carry no site keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import train
from megatron.assemble import dry_run
from megatron.config.load import load_config
from megatron.config.problems import Problems
from megatron.config.schema import RunConfig
from megatron.config.yaml_reader import read_files
from megatron.errors import ConfigError, DataError
from megatron.planning import segment_memory

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SITE = "local_setup.yml"
SITES = {"local_setup", "pile-gpt2", "pile-neox"}
# Runs from data to folders in one file. Everything else is a model file, which local_setup.yml completes.
COMPLETE = {"alibi-wt103", "based-quickstart", "extrapolation", "jrt-quickstart", "metala-quickstart"}
# Of tools/long_context.py; tests/tools/test_long_context.py reads it.
SWEEPS = {"long-context-cpu"}
MODELS = sorted({path.stem for path in CONFIGS.glob("*.yml")} - COMPLETE - SITES - SWEEPS)
QUICK = ("metala", "based-360m", "jrt-360m")
SITE_KEYS = {"data_path", "data_impl", "tokenizer_type", "vocab_file", "merge_file", "save", "load", "run_dir", "log_dir"}
SITE_KEYS |= {"tensorboard_dir", "use_wandb", "hostfile", "split"}
SITE_KEYS |= {f"{part}_data_paths" for part in ("train", "valid", "test")}


def _short(run: RunConfig) -> RunConfig:
    """The same run on sequences of 64 tokens, with a vocabulary that is known: its dry run takes seconds and not a minute."""
    model = run.model.model_copy(update={"seq_length": 64})
    layers = {**run.layers, "jrt": {**run.layers["jrt"], "prefix_length": 32}} if "jrt" in run.layers else run.layers
    rows = run.tokenizer.padded_vocab_size or 4096
    tokenizer = run.tokenizer.model_copy(update={"padded_vocab_size": rows})
    batch = run.batch.model_copy(update={"train_micro_batch_size_per_gpu": 1})
    return run.model_copy(update={"model": model, "layers": layers, "tokenizer": tokenizer, "batch": batch})


def _keys(name: str) -> set[str]:
    return set(read_files([name], CONFIGS, Problems()).values)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_carries_no_site_keys(name: str) -> None:
    assert not _keys(name) & SITE_KEYS


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_every_model_file_starts_beside_the_site_file(name: str) -> None:
    run = load_config([f"{name}.yml", SITE], conf_dir=CONFIGS, world_size=8)
    assert run.warnings == () and run.data.data_path and run.checkpoint.save == "checkpoints"
    found = dry_run(_short(run), device_memory=1e6)
    assert found.fits and "parameters" in found.text


@pytest.mark.parametrize("name", sorted(COMPLETE))
def test_a_complete_run_starts_alone_and_says_so_beside_a_site_file(name: str) -> None:
    run = load_config([f"{name}.yml"], conf_dir=CONFIGS, world_size=1)
    assert run.checkpoint.save and (run.data.data_path or run.data.train_data_paths)
    assert dry_run(_short(run), device_memory=1e6).fits
    with pytest.raises(ConfigError, match=r"save is given twice|problems") as caught:
        load_config([f"{name}.yml", SITE], conf_dir=CONFIGS, world_size=1)
    assert "needs no site file" in str(caught.value)


@pytest.mark.parametrize("site", sorted(SITES))
def test_a_site_file_has_the_keys_of_a_site_and_no_others(site: str) -> None:
    assert _keys(site) <= SITE_KEYS and {"data_path", "tokenizer_type", "vocab_file", "save", "load"} <= _keys(site)


@pytest.mark.parametrize("name", ["based-360m", "jrt-360m", "metala-360m-15b"])
def test_the_papers_runs_start_beside_the_site_files_of_the_pile(name: str) -> None:
    site = "pile-neox.yml" if name.startswith("metala") else "pile-gpt2.yml"
    run = load_config([f"{name}.yml", site], conf_dir=CONFIGS, world_size=8)
    assert run.warnings == () and str(run.data.data_path).startswith("data/pile-")


def test_a_model_file_alone_says_that_it_needs_a_site_file() -> None:
    with pytest.raises(DataError, match="no training data is named") as caught:
        train.main(["-d", str(CONFIGS), "metala"])
    assert "configs/local_setup.yml" in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_dry_run_of_every_model_file_at_its_full_length(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A matter of seconds: ten thousand operations on tensors without numbers take one to two of them."""
    count, dispatch = 0, segment_memory._Live.__torch_dispatch__

    def counted(self: segment_memory._Live, *arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return dispatch(self, *arguments, **named)

    monkeypatch.setattr(segment_memory._Live, "__torch_dispatch__", counted)
    assert train.main(["-d", str(CONFIGS), name, "local_setup", "--dry-run", "--device-memory", "1000000"]) == 0
    assert "memory per rank" in capsys.readouterr().out and 0 < count < 60_000
