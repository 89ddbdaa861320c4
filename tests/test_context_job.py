"""Context parallelism as a user runs it: deepy.py on four processes, resumed on other sizes; refusals and the dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron import registry
from megatron.config.cli import planned_world
from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.data.packing import PACK_IMPLS
from megatron.errors import ConfigError
from megatron.model.build import check_context_parallel
from megatron.model.config import ModelConfig
from tests.commands import run_here
from tests.parallel.rank_server import free_port
from tests.parallel.ranks import run_ranks
from tests.tiny_run import losses, write_run

ROOT = Path(__file__).resolve().parents[1]
HYBRID = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_config": [[["metala", "based", "sliding", "base_conv"], 1]],
    "sliding_window": 5,
    "train_iters": 20,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "train_micro_batch_size_per_gpu": 0,
    "reset_state_at_eod": True,
    "eod_mask_loss": True,
    "eval_interval": 10,
    "eval_iters": 1,
    "split": "80,10,10",
}


def config_of(folder: Path, **changes: Any) -> Path:
    """The tiny hybrid; its documents of 101 tokens cross the rows of 32 and their shards."""
    saving = {"checkpoint_factor": 20, "save": str(folder / "run/checkpoints"), "load": str(folder / "run/checkpoints")}
    values = {**HYBRID, **saving, "run_dir": str(folder / "run"), **changes}
    return write_run(folder, **values)


def words_of(values: dict[str, Any]) -> list[str]:
    """`--set KEY=VALUE` for each."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def train(config: Path, **values: Any) -> str:
    """deepy.py with real processes; its output."""
    words = words_of({"master_port": free_port(), **values})
    command = [sys.executable, "deepy.py", "train.py", str(config), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_on_a_rank(words: list[str]) -> str:
    """The job of a forked rank: train.py as a launcher starts it; its output."""
    done = run_here("train.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metric(run_dir: Path, key: str) -> dict[int, float]:
    """Step -> the last value of a metric."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["iteration"]: row[key] for row in rows if key in row}


@pytest.mark.slow
def test_a_run_moves_from_four_shards_to_two_to_one(tmp_path: Path) -> None:
    """Steps 1 to 7 with context parallel size 4, to 14 with 2 x data 2, to 20 in one process: the losses of one process.

    deepy.py starts the first four ranks; the next four are forked.
    """
    alone = config_of(tmp_path / "alone")
    done = run_here("train.py", alone, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    expected = losses(tmp_path / "alone/run")
    assert len(expected) == 20 and expected[20] < expected[1]
    config = config_of(tmp_path / "moved")
    first = train(config, num_gpus=4, context_parallel_size=4, exit_interval=7)
    assert "4 processes = 1 pipeline x 1 data x 4 context x 1 tensor" in first
    manifest = json.loads((tmp_path / "moved/run/checkpoints/global_step7/manifest.json").read_text())
    assert manifest["facts"]["context_parallel_size"] == 4 and manifest["mesh"] == {"pp": 1, "dp": 4, "tp": 1}
    sizes = {"num_gpus": 4, "context_parallel_size": 2, "exit_interval": 7, "context_parallel_exchange": "scan"}
    second = run_ranks(train_on_a_rank, 4, [str(config), *words_of(sizes)], connect=False, timeout=200)[0]
    assert "1 pipeline x 2 data x 2 context x 1 tensor" in second and "resumed from iteration 7" in second
    last = run_here("train.py", config, env={"OMP_NUM_THREADS": "1"})
    assert last.returncode == 0 and "resumed from iteration 14" in last.stdout, last.stdout + last.stderr
    moved = losses(tmp_path / "moved/run")
    assert moved.keys() == expected.keys()
    assert max(abs(moved[step] - loss) / loss for step, loss in expected.items()) < 1e-5
    for key in ("train/samples", "validation/lm_loss"):
        one, other = metric(tmp_path / "alone/run", key), metric(tmp_path / "moved/run", key)
        assert one and {step: other[step] for step in one} == pytest.approx(one, rel=1e-5), key


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    """Load the hybrid for some processes with changes."""

    def loaded(world: int, **changes: Any) -> RunConfig:
        return load_config([config_of(tmp_path, **changes)], world_size=world)

    return loaded


def test_sizes_follow_the_context_parallel_size(load: Callable[..., RunConfig]) -> None:
    run = load(8, context_parallel_size=4)
    assert (run.parallel.data_parallel_size, run.parallel.model_processes) == (8, 4)
    assert (run.batch.train_batch_size, run.batch.train_micro_batch_size_per_gpu) == (4, 1)
    micro = load(8, context_parallel_size=4, train_batch_size=0, train_micro_batch_size_per_gpu=3)
    assert micro.batch.train_batch_size == 3 * 2 * 2


@pytest.mark.parametrize("pack_impl", PACK_IMPLS)
def test_rows_of_whole_documents_are_accepted(load: Callable[..., RunConfig], pack_impl: str) -> None:
    """The guide says so: their fill is masked in the loss, and no padding mask reaches a mixer."""
    assert load(2, context_parallel_size=2, pack_impl=pack_impl).data.pack_impl == pack_impl


def test_a_plan_without_processes_counts_the_ranks_of_one_sequence(tmp_path: Path) -> None:
    run = load_config([config_of(tmp_path, context_parallel_size=2, model_parallel_size=2)], check=False)
    assert planned_world(run) == 4


@pytest.mark.parametrize(
    ("world", "changes", "words"),
    [
        (
            6,
            {"context_parallel_size": 4},
            ("6 processes cannot be divided", "context_parallel_size 4", "multiple of their product"),
        ),
        (
            3,
            {"context_parallel_size": 3},
            ("seq_length 32 is not a multiple of context_parallel_size 3", "seq_length: 33 or 30; or context_parallel_size: 2"),
        ),
        (
            6,
            {"context_parallel_size": 2, "model_parallel_size": 3, "sequence_parallel": True},
            ("not a multiple of context_parallel_size 2 x model_parallel_size 3 (sequence_parallel)", "seq_length: 36 or 30"),
        ),
        (2, {"context_parallel_size": 2, "engine": "single"}, ("engine: single runs one process, not 2", "engine: auto")),
        (1, {"context_parallel_size": 0}, ("context_parallel_size", "1")),
        (2, {"context_parallel_exchange": "ring"}, ("context_parallel_exchange", "all_gather", "scan")),
    ],
)
def test_refusals(load: Callable[..., RunConfig], world: int, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(world, **changes)
    for word in words:
        assert word in str(caught.value)


def test_a_mixer_that_is_not_ready_is_named(load: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.layers.based import Based

    infos = registry._table()
    monkeypatch.setitem(infos, "based", replace(infos["based"], context_parallel=False))
    with pytest.raises(ConfigError, match="layers 'based' cannot read shards of a sequence") as caught:
        load(2, context_parallel_size=2)
    assert "or mixers of" in str(caught.value) and "metala" in str(caught.value)
    monkeypatch.setattr(Based, "context_parallel", False)
    with pytest.raises(ConfigError, match="layers 'based' cannot read shards of a sequence"):
        check_context_parallel(model("based"), 2, 1, 32)


def model(*types: str, **options: dict[str, Any]) -> ModelConfig:
    """Layers of these types, four heads."""
    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=len(types),
        num_heads=4,
        mlp_width=48,
        layer_types=types,
        layer_options=options,
    )


@pytest.mark.parametrize(
    ("types", "options", "size", "tensor", "length", "words"),
    [
        (("global",), {}, 8, 1, 64, ("4 key/value heads", "context_parallel_size 8", "context_parallel_size: 4", "sliding")),
        (("global",), {}, 4, 2, 64, ("4 key/value heads", "model_parallel_size 2", "context_parallel_size: 2")),
        (("sliding",), {"sliding": {"window": 20}}, 4, 1, 64, ("16 tokens", "the 20 that", "context_parallel_size: 2 at most")),
        (
            ("metala",),
            {},
            5,
            1,
            64,
            ("64 is not a multiple of context_parallel_size 5", "seq_length: 65 or 60; or context_parallel_size: 4"),
        ),
    ],
)
def test_models_that_cannot_be_split_are_refused(
    types: tuple[str, ...], options: dict[str, Any], size: int, tensor: int, length: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_context_parallel(model(*types, **options), size, tensor, length)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    check_context_parallel(model(*types, **options), 2, 1, 64)


def test_short_shards_are_warned_of(load: Callable[..., RunConfig]) -> None:
    (line,) = load(2, context_parallel_size=2).warnings
    assert "context_parallel_size 2 leaves 16 tokens per rank: below 16,384 (hidden_size 32)" in line
    assert not load(2).warnings
    assert not load(2, context_parallel_size=2, seq_length=32_768).warnings
    (line,) = load(4, context_parallel_size=4, seq_length=32_764, hidden_size=2048).warnings
    assert "below 8,192" in line
    assert not load(4, context_parallel_size=4, seq_length=32_768, hidden_size=2048).warnings


def test_the_launcher_counts_shards(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    done = run_here("deepy.py", "train.py", config, "--print-launch", *words_of({"context_parallel_size": 4}))
    assert done.returncode == 0 and done.stdout.startswith("# 4 processes"), done.stdout + done.stderr
    bad = run_here("deepy.py", "train.py", config, "--print-launch", *words_of({"context_parallel_size": 4, "num_gpus": 2}))
    assert bad.returncode == 2
    assert "2 processes cannot" in bad.stderr and "context_parallel_size 4" in bad.stderr


def test_the_dry_run_says_what_is_sent(tmp_path: Path) -> None:
    plain = {"num_layers": 2, "attention_config": [[["metala"], 2]]}
    config = write_run(tmp_path, checkpoint_activations=True, train_iters=20, **plain)
    words = ("--dry-run", "--device-memory", "80")
    done = run_here("deepy.py", "train.py", config, *words, *words_of({"context_parallel_size": 4, "num_gpus": 4}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pipeline 1 x data 1 x context 4 x tensor 1" in done.stdout
    assert "8 tokens of a sequence per rank; states and halos:" in done.stdout
    alone = run_here("deepy.py", "train.py", config, *words)
    assert alone.returncode == 0 and "context" not in alone.stdout


def test_evaluation_and_generation_read_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    """They run with one shard, whatever the config says."""
    config = config_of(tmp_path, train_iters=2, checkpoint_factor=2, eval_iters=0)
    assert run_here("train.py", config, env={"OMP_NUM_THREADS": "1"}).returncode == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\n")
    size = words_of({"context_parallel_size": 4})
    done = run_here("generate.py", config, "-i", prompts, "-o", tmp_path / "out.jsonl", *size, "--set", "maximum_tokens=3")
    assert done.returncode == 0 and (tmp_path / "out.jsonl").read_text().count("\n") == 1, done.stderr
    done = run_here("eval.py", config, "--eval_tasks", "perplexity", *size)
    assert done.returncode == 0 and "wrote" in done.stdout, done.stdout + done.stderr


def test_a_trainer_of_one_process_says_how_to_start(tmp_path: Path) -> None:
    import linear_neox as ln

    with pytest.raises(ConfigError, match="the configuration needs 2 processes") as caught:
        ln.Trainer(ln.load_config(str(config_of(tmp_path)), world_size=2, context_parallel_size=2))
    assert "context_parallel_size=1" in str(caught.value)
