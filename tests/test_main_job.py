"""The main job as a user runs it: one YAML, real commands, resume bitwise, and one clear message for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_here

ROOT = Path(__file__).resolve().parents[1]
TEXT = "the cat sat on the mat and the dog ate the log. " * 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level corpus of forty short documents."""
    from megatron.data.indexed import IndexedWriter, dtype_for_vocab

    folder = tmp_path_factory.mktemp("corpus")
    with IndexedWriter(str(folder / "text_document"), dtype_for_vocab(512)) as writer:
        for i in range(40):
            writer.add_document([*f"{i} {TEXT}".encode(), 0])
    return folder


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    """A tiny MetaLA run on it."""
    values = {
        "data_path": str(corpus / "text_document"),
        "tokenizer_type": "CharLevelTokenizer",
        "data_impl": "mmap",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 32,
        "attention_config": [[["metala"], 2]],
        "norm": "simplermsnorm",
        "mlp_type": "llama",
        "activation": "silu",
        "intermediate_size": 64,
        "use_bias_in_mlp": False,
        "make_vocab_size_divisible_by": 64,
        "optimizer": {"type": "Adam", "params": {"lr": 0.003}},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "train_iters": 20,
        "eval_interval": 10,
        "eval_iters": 2,
        "log_interval": 1,
        "checkpoint_factor": 10,
        "hidden_dropout": 0.1,
        "run_dir": str(tmp_path / "run"),
        "save": str(tmp_path / "run" / "checkpoints"),
        "load": str(tmp_path / "run" / "checkpoints"),
    }
    path = tmp_path / "tiny.yml"
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def run(*arguments: str | Path, code: int = 0, here: bool = False) -> str:
    """Run a command of the tree; returns its output and checks its exit code, and that no traceback reached the user.

    here: in the test process, see `tests/commands.py`.
    """
    line = [sys.executable, *map(str, arguments)]
    if here:
        done = run_here(*arguments)
    else:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    if code:
        assert "Traceback" not in text, text
    return text


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/lm_loss"] for row in rows if "train/lm_loss" in row]


@pytest.mark.slow
def test_stop_and_resume_is_bit_equal_and_the_run_folder_is_whole(config: Path, tmp_path: Path) -> None:
    """Stopped after step 7 of 20 and started again: every loss as in the uninterrupted run, dropout included."""
    whole = tmp_path / "whole"
    place = ("--set", f"run_dir={whole}", "--set", f"save={whole}/checkpoints", "--set", f"load={whole}/checkpoints")
    run("deepy.py", "train.py", config, *place, here=True)
    expected = losses(whole)
    assert len(expected) == 20 and expected[-1] < expected[0]
    first = run("deepy.py", "train.py", config, "--set", "exit_interval=7")
    assert "stopped: exit_interval 7" in first
    assert losses(tmp_path / "run") == expected[:7]
    second = run("deepy.py", "train.py", config, here=True)
    assert "resumed from iteration 7" in second
    assert losses(tmp_path / "run") == expected
    root = tmp_path / "run"
    for name in (
        "config.yml",
        "command.txt",
        "metrics.jsonl",
        "loss.png",
        "logs",
        "checkpoints/latest",
        "checkpoints/global_step20",
    ):
        assert (root / name).exists(), name
    assert (root / "checkpoints" / "latest").read_text().strip() == "global_step20"
    assert len((root / "command.txt").read_text().splitlines()) == 2


@pytest.mark.slow
def test_two_processes_of_torchrun_give_the_losses_of_one(config: Path, tmp_path: Path) -> None:
    """Data-parallel, fp32 losses within 1e-5; deepy.py starts two tensor-parallel ones below, with the fused kernels."""
    plain = ("--set", "hidden_dropout=0", "--set", "train_iters=6", "--set", "checkpoint_factor=6")

    def place(name: str) -> tuple[str, ...]:
        folder = tmp_path / name
        return ("--set", f"run_dir={folder}", "--set", f"save={folder}/checkpoints", "--set", f"load={folder}/checkpoints")

    run("train.py", config, *plain, *place("one"), here=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    run(*torchrun, "train.py", config, *plain, *place("dp2"), "--set", "gradient_accumulation_steps=1")
    one, other = losses(tmp_path / "one"), losses(tmp_path / "dp2")
    assert len(other) == 6
    assert all(abs(a - b) <= 1e-5 * a for a, b in zip(one, other, strict=True)), (one, other)


def mistaken(config: Path, *overrides: str) -> str:
    """The message of a run that must refuse to start; in this process, as train.py does it."""
    import train
    from megatron.errors import UserError

    arguments = [str(config)]
    for override in overrides:
        arguments += ["--set", override]
    with pytest.raises(UserError) as caught:
        train.main(arguments)
    assert caught.value.exit_code != 0
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attention_config=[[[metalla],2]]"], ["metalla", "did you mean 'metala'", "attention_config"]),
        (["hidden_sizee=3"], ["hidden_sizee", "hidden_size"]),
        (["num_attention_heads=5"], ["hidden_size", "num_attention_heads"]),
        (["train_batch_size=7"], ["train_batch_size", "7"]),
        (["min_lr=1"], ["min_lr"]),
    ],
)
def test_mistakes_in_the_config(config: Path, overrides: list[str], words: list[str]) -> None:
    message = mistaken(config, *overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model_parallel_size": 2, "num_attention_heads": 1}, ["num_attention_heads", "model_parallel_size"]),
        ({"pipe_parallel_size": 8}, ["pipe_parallel_size", "num_layers"]),
    ],
)
def test_meshes_that_cannot_hold_the_model(config: Path, overrides: dict[str, int], words: list[str]) -> None:
    """Refused before any process starts, as deepy.py checks them."""
    from megatron.config.load import load_config
    from megatron.errors import ConfigError

    size = overrides.get("model_parallel_size", 1) * overrides.get("pipe_parallel_size", 1)
    with pytest.raises(ConfigError) as caught:
        load_config([config], overrides=overrides, world_size=size)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_mistakes_in_the_data(config: Path, corpus: Path, tmp_path: Path) -> None:
    assert "nowhere" in mistaken(config, f"data_path={tmp_path}/nowhere")
    for name in ("bin", "idx"):
        copy = tmp_path / f"cut_{name}"
        for suffix in (".bin", ".idx"):
            data = (corpus / f"text_document{suffix}").read_bytes()
            copy.with_suffix(suffix).write_bytes(data[: len(data) // 2] if suffix == f".{name}" else data)
        message = mistaken(config, f"data_path={copy}")
        assert f"cut_{name}.{name}" in message, message
    assert "vocab_file" in mistaken(config, "tokenizer_type=HFTokenizer")


def test_a_token_beyond_the_vocabulary_names_itself(config: Path, tmp_path: Path) -> None:
    from megatron.data.indexed import IndexedWriter, dtype_for_vocab

    with IndexedWriter(str(tmp_path / "big"), dtype_for_vocab(512)) as writer:
        for _ in range(40):
            writer.add_document([5, 700, 3] * 30)
    message = mistaken(config, f"data_path={tmp_path}/big", "save=null", "load=null", "checkpoint_factor=null", "eval_iters=0")
    assert "700" in message and "512" in message, message


def test_a_wrong_load_is_an_error_and_an_empty_save_is_a_start(config: Path, tmp_path: Path) -> None:
    message = mistaken(config, f"load={tmp_path}/elsewhere")
    assert "no checkpoint to load" in message and "elsewhere" in message


def test_mistakes_reach_the_user_as_one_message_and_an_exit_code(config: Path) -> None:
    text = run("deepy.py", "train.py", config, "--set", "hidden_sizee=64", code=2, here=True)
    assert text.startswith("error:") and "hidden_size" in text
    text = run("deepy.py", "train.py", "nowhere.yml", code=2, here=True)
    assert "nowhere.yml" in text
    text = run("train.py", config, "--set", "data_path=nowhere", code=3)
    assert "nowhere" in text


def test_dry_run(config: Path) -> None:
    """Of a shipped model on short sequences: `tests/test_configs_shipped.py` plans them all at their full length."""
    words = ("--dry-run", "--device-memory", "80", "--set", "seq_length=128")
    text = run("deepy.py", "train.py", "configs/metala.yml", *words, here=True)
    assert "360,058,880" in text and "memory per rank" in text and "FLOPs per token" in text and "warning" not in text


@pytest.mark.slow
def test_a_dry_run_prints_the_warnings_of_a_start(config: Path) -> None:
    """First, and in the words of the start."""
    ignored = ("--set", "dump_state=true")
    planned = run("train.py", config, "--dry-run", *ignored, here=True)
    line = "warning: dump_state is ignored (--set): use --print-config"
    assert planned.startswith(f"{line}\nmodel "), planned
    assert f"] {line}\n" in run("train.py", config, *ignored, "--set", "train_iters=1", here=True)


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize(
    ("mixer", "operator", "small"),
    [
        ("metala", "metala", ()),
        ("mamba", "selective_scan", ("mamba_expand=1", "mamba_state_size=4", "seq_length=12")),
        ("based", "taylor", ("based_feature_width=4", "seq_length=12")),
        ("jrt", "taylor.prefix", ("jrt_feature_width=4", "jrt_prefix_length=5", "objective=prefix", "seq_length=12")),
    ],
    ids=["metala", "mamba", "based", "jrt"],
)
def test_fused_kernels_train_as_the_plain_path_does(
    config: Path,
    tmp_path: Path,
    mixer: str,
    operator: str,
    small: tuple[str, ...],
    tensor_parallel: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps with `kernel_backend: triton`, interpreted on the CPU: losses within 1e-5 of one process' torch path (fp32).

    The later losses are those of weights which the kernels' gradients have moved.
    """
    pytest.importorskip("triton", reason="the fused kernels need Triton")
    values = ["hidden_dropout=0", "train_iters=3", "checkpoint_factor=3", "eval_iters=0", "num_layers=1"]
    values += [f'attention_config=[[["{mixer}"], 1]]', "train_micro_batch_size_per_gpu=1", *small]
    common = [word for value in values for word in ("--set", value)]
    found = {}
    for backend, size in (("torch", 1), ("triton", tensor_parallel)):
        folder = tmp_path / backend
        place = ("--set", f"run_dir={folder}", "--set", f"save={folder}/checkpoints", "--set", f"load={folder}/checkpoints")
        mesh = ("--set", f"model_parallel_size={size}")
        words = ("deepy.py", "train.py", config, *common, *place, *mesh, "--set", f"kernel_backend={backend}")
        monkeypatch.setattr("megatron.ops.dispatch._logged", set())  # logged once in a process
        assert f"operator {operator}: {backend} path" in run(*words, here=size == 1)
        found[backend] = losses(folder)
    assert len(found["torch"]) == 3
    assert all(abs(a - b) <= 1e-5 * a for a, b in zip(found["torch"], found["triton"], strict=True)), found


def _stopped_and_resumed(config: Path, tmp_path: Path, *overrides: str) -> None:
    """Six steps at once, and stopped after the third: the same losses bitwise."""
    import train

    def go(name: str, *more: str) -> list[float]:
        folder = tmp_path / name
        place = [f"run_dir={folder}", f"save={folder}/checkpoints", f"load={folder}/checkpoints", "checkpoint_factor=3"]
        train.main([str(config), *[word for item in (*place, *overrides, *more) for word in ("--set", item)]])
        return losses(folder)

    whole = go("whole")
    go("parts", "exit_interval=3")
    assert go("parts") == whole and len(whole) == 6


@pytest.mark.slow
def test_whole_documents_and_document_boundaries(config: Path, tmp_path: Path) -> None:
    _stopped_and_resumed(config, tmp_path, "pack_impl=pack_until_overflow", "reset_state_at_eod=true", "train_iters=6")


def test_epochs_instead_of_steps(config: Path, tmp_path: Path) -> None:
    """The number of steps follows from the data: one pass over forty documents of some 150 bytes at 32 tokens a sample."""
    import train

    folder = tmp_path / "epoch"
    place = [f"run_dir={folder}", "save=null", "load=null", "checkpoint_factor=null", "train_iters=null", "train_epochs=1"]
    place += ["eval_iters=0", "gradient_accumulation_steps=8"]
    train.main([str(config), *[word for item in place for word in ("--set", item)]])
    assert 8 <= len(losses(folder)) <= 13


@pytest.mark.slow
def test_text_streamed_while_training(config: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"body": f"{i} {TEXT}"}) + "\n" for i in range(60)), encoding="utf-8")
    stream = ("data_path=null", f"train_stream=[{text}]", "stream_key=body", "eval_iters=0", "train_iters=6")
    _stopped_and_resumed(config, tmp_path, *stream)
    manifest = json.loads((tmp_path / "whole" / "checkpoints" / "global_step6" / "manifest.json").read_text())
    assert manifest["facts"]["data"] == [str(text)]


def test_resume_on_other_data_is_refused(config: Path, corpus: Path, tmp_path: Path) -> None:
    import train
    from megatron.data.indexed import IndexedWriter, dtype_for_vocab

    with IndexedWriter(str(tmp_path / "other"), dtype_for_vocab(512)) as writer:
        for _ in range(50):
            writer.add_document([*b"another text altogether, much the same length. " * 3, 0])
    train.main([str(config), "--set", "train_iters=2", "--set", "checkpoint_factor=2", "--set", "eval_iters=0"])
    message = mistaken(config, f"data_path={tmp_path}/other")
    assert "not the one of the checkpoint" in message, message
