"""The three commands as a person types them: export, import, generate; and what they say when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.commands import run_here
from tests.data.hf_files import write
from tests.export.hub_server import TOKEN, running_hub

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"tokenizer": {"type": "CharLevelTokenizer", "vocab_size": 512, "eod": 0, "pad": 1}, "seq_length": 64}

pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """One command. What may ask the Hub is a process of its own, for libraries read their variables once: nobody is logged in
    there, and its address leads nowhere, unless `variables` say otherwise.
    """
    if not variables and "--push-to-hub" not in words:
        return run_here(str(words[0]), *words[1:], cwd=cwd, text=text)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment = {k: v for k, v in environment.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")} | variables
    command = [sys.executable, str(ROOT / str(words[0])), *map(str, words[1:])]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(facts=FACTS, vocab_size=640)


def test_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    out = run("tools/convert_to_hf.py", "--checkpoint", checkpoint, "--output", tmp_path / "hf", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "128 rows that padded the table" in out.stdout and "from_pretrained" in out.stdout
    back = run("tools/convert_from_hf.py", "--input", tmp_path / "hf", "--output", tmp_path / "ck", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert "2 layers, hidden size 32, 2 heads, MLP 48, vocabulary 512" in back.stdout
    assert (tmp_path / "ck" / "latest").read_text().strip() == "global_step0"


def test_mistakes_are_one_message_and_exit_codes(checkpoint: Path, tmp_path: Path) -> None:
    lost = run("tools/convert_to_hf.py", "--checkpoint", tmp_path / "x", "--output", tmp_path / "hf", cwd=tmp_path)
    assert lost.returncode == 4 and "not a checkpoint" in lost.stderr and "Traceback" not in lost.stderr
    lost = run("tools/convert_from_hf.py", "--input", checkpoint, "--output", tmp_path / "ck", cwd=tmp_path)
    assert lost.returncode == 6 and "already is a checkpoint" in lost.stderr and "Traceback" not in lost.stderr


def test_push_dry_and_for_real(checkpoint: Path, tmp_path: Path) -> None:
    scores = {"checkpoint": str(checkpoint), "lm_eval": "0.4.13", "results": {"piqa": {"acc,none": 0.625}}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    card = ("--license", "mit", "--language", "en", "--dataset", "ada/books", "--eval-results", "scores.json")
    convert = ("tools/convert_to_hf.py", "--checkpoint", checkpoint, "--output", "hf", *card, "--push-to-hub", "ada/tiny")
    dry = run(*convert, "--private", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "logits compared" in dry.stdout and "repository: ada/tiny\nvisibility: private\n" in dry.stdout
    assert "model.safetensors" in dry.stdout and "dry run: nothing was sent" in dry.stdout
    assert dry.stderr == "", "of a fresh process, whose libraries have been imported by the command"
    readme = (tmp_path / "hf" / "README.md").read_text()
    for fact in ("license: mit", "language:\n- en", "datasets:\n- ada/books", "model-index:", "| piqa | acc | 0.6250 |"):
        assert fact in readme
    push = ("tools/convert_to_hf.py", "--folder", "hf", "--push-to-hub", "tiny", "--private")
    nowhere = run(*push, cwd=tmp_path, HF_TOKEN=TOKEN)
    assert nowhere.returncode == 6 and "the Hub cannot be reached" in nowhere.stderr and "Traceback" not in nowhere.stderr
    with running_hub() as hub:
        done = run(*push, "--commit-message", "Step 0", cwd=tmp_path, HF_TOKEN=TOKEN, HF_ENDPOINT=hub.url)
        assert done.returncode == 0, done.stderr
        repo = hub.repos["ada/tiny"]
        assert repo.private and repo.commits == [("main", "Step 0")]
        sent = {name: text for name, text in repo.branches["main"].items() if name != ".gitattributes"}
        assert sent == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
        assert 'from_pretrained("ada/tiny", trust_remote_code=True)' in done.stdout and "(private)" in done.stdout
    assert all(TOKEN not in out for out in (nowhere.stderr, done.stdout, done.stderr))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --checkpoint and --output"),
        (("--folder", "hf"), "--folder: only together with --push-to-hub"),
        (("--checkpoint", "c", "--output", "o", "--private", "--dry-run"), "--private, --dry-run: only together"),
        (("--folder", "hf", "--push-to-hub", "a/b", "--license", "mit", "--dtype", "float16"), "--license, --dtype would have"),
    ],
)
def test_push_options_that_would_do_nothing(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    lost = run("tools/convert_to_hf.py", *words, cwd=tmp_path)
    assert lost.returncode == 2 and message in " ".join(lost.stderr.split())


def test_a_push_that_cannot_be_is_refused_before_the_export(checkpoint: Path, tmp_path: Path) -> None:
    convert = ("tools/convert_to_hf.py", "--checkpoint", checkpoint, "--output", "hf")
    for more, message in (
        (("--push-to-hub", "a b", "--dry-run"), "'a b' is not a repository name of the Hub"),
        (("--push-to-hub", "a/b"), "no token for the Hugging Face Hub"),
        (("--license", "Apache 2"), "not a license identifier"),
        (("--eval-results", "none.json"), "the results cannot be read"),
    ):
        lost = run(*convert, *more, cwd=tmp_path)
        assert lost.returncode == 6 and message in lost.stderr and "Traceback" not in lost.stderr
        assert not (tmp_path / "hf").exists()


def config(tmp_path: Path, **more: object) -> Path:
    values = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_config": [[["metala"], 2]],
        "seq_length": 64,
        "max_position_embeddings": 64,
        "tokenizer_type": "CharLevelTokenizer",
        "train_micro_batch_size_per_gpu": 1,
        "train_iters": 1,
        "load": str(tmp_path / "run"),
        "maximum_tokens": 9,
    }
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(values | more))
    return path


def test_generate_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\nanother one\n")
    done = run("generate.py", config(tmp_path), "-i", "prompts.txt", "-o", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["context"] for r in records] == ["one", "another one"]
    assert all(r["length"] == 9 or r["finished"] for r in records)
    again = run("generate.py", config(tmp_path, recompute=True), "-i", "prompts.txt", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    other = [json.loads(line) for line in (tmp_path / "prompts.txt.output.jsonl").read_text().splitlines()]
    assert [r["text"] for r in other] == [r["text"] for r in records]


def test_generate_from_nothing_and_by_hand(checkpoint: Path, tmp_path: Path) -> None:
    done = run("generate.py", config(tmp_path, num_samples=3, temperature=1.0), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "samples.txt").read_text().splitlines()) == 3
    talk = run("generate.py", config(tmp_path, text_gen_type="interactive"), cwd=tmp_path, text="hello\n")
    assert talk.returncode == 0 and talk.stdout.count("Context >>>") == 2, talk.stderr
    lost = run("generate.py", config(tmp_path, load=str(tmp_path / "none")), cwd=tmp_path)
    assert lost.returncode == 4 and "Traceback" not in lost.stderr


def test_foreign_weights_train_on_and_go_out_again(tmp_path: Path) -> None:
    """The commands as they are printed, with a tokenizer that has no padding token and no row to spare for one."""
    folder = tmp_path / "llama"
    folder.mkdir()
    file = write(folder / "tokenizer.json")
    file.write_text(file.read_text("utf-8").replace("<|padding|>", "<unk>"), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    sizes = {"vocab_size": 270, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    LlamaForCausalLM(LlamaConfig(**sizes, rope_theta=5e5)).save_pretrained(folder)
    (tmp_path / "text.jsonl").write_text('{"text": "the cat sat on the mat the cat sat"}\n' * 60)
    output = ("--output", "runs/imported/checkpoints")
    done = run("tools/convert_from_hf.py", "--input", "llama", *output, "--data", "text.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("python deepy.py train.py runs/imported/checkpoints/continue.yml")
    sets = ("--set", "seq_length=24", "--set", "train_iters=2")
    done = run("deepy.py", ROOT / "train.py", "runs/imported/checkpoints/continue.yml", *sets, cwd=tmp_path)
    assert done.returncode == 0 and "finished at iteration 2 of 2" in done.stdout, done.stdout + done.stderr
    done = run("tools/convert_to_hf.py", "--checkpoint", "runs/imported/continued", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said, kept = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("llama", "out"))
    for key in ("vocab_size", "rope_parameters", "max_position_embeddings", "num_key_value_heads", "rms_norm_eps"):
        assert said[key] == kept[key], key
