"""The public API: lazy, and the numbers of the commands."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as eval_command
import generate as generate_command
import linear_neox as ln
from megatron.config.load import load_config
from tests.tiny_run import losses, write_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ln.Trainer]:
    """The configuration of a tiny run, made by `train` with checkpoint and metrics; and a Trainer at its end."""
    folder = tmp_path_factory.mktemp("api")
    config = write_run(folder, train_iters=6, eval_iters=2, split="80, 10, 10", run_dir=str(folder / "run"))
    trainer = ln.Trainer(config)
    trainer.train(2)
    trainer.train()
    run = ln.train(config, save=str(folder / "checkpoints"))
    assert run.exit_code == 0 and run.state.iteration == 6
    return config, trainer


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, linear_neox; names = dir(linear_neox); linear_neox.__version__;"
        "heavy = [m for m in ('torch', 'numpy', 'pydantic', 'deepspeed', 'transformers') if m in sys.modules];"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_documented() -> None:
    for name in ln.HOMES:
        value = getattr(ln, name)
        assert name in dir(ln) and name in ln.__all__
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        ln.trian  # noqa: B018


def test_names_for_type_checkers_are_the_names_at_run_time() -> None:
    """The imports under TYPE_CHECKING, which only type checkers read, name the same things from the same modules."""
    text = Path(ln.__file__).read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if line.startswith("    from ") and " as " in line]
    assert {words[-1]: words[1] for words in lines} == ln.HOMES


def test_a_trainer_takes_the_steps_of_the_command(trained: tuple[Path, ln.Trainer]) -> None:
    config, trainer = trained
    rows = losses(config.parent / "run")
    assert {step.iteration: step.loss for step in trainer.history} == pytest.approx(rows, abs=1e-6)
    text = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    evaluated = [row["validation/lm_loss"] for row in map(json.loads, text) if "validation/lm_loss" in row]
    assert trainer.evaluate().loss == pytest.approx(evaluated[-1], abs=1e-6)


def test_a_trainer_writes_nothing_unasked_and_ends_at_train_iters(trained: tuple[Path, ln.Trainer], tmp_path: Path) -> None:
    config, trainer = trained
    assert trainer.iteration == 6 and trainer.train(10) == []
    with ln.Trainer(config, run_dir=str(tmp_path / "run"), save=str(tmp_path / "save")) as other:
        other.train(1)
    assert not list(tmp_path.iterdir())


def test_a_trainer_goes_on_from_the_checkpoint_of_a_run(trained: tuple[Path, ln.Trainer], tmp_path: Path) -> None:
    config, whole = trained
    first = ln.Trainer(config)
    first.train(4)
    first.save(tmp_path / "save")
    second = ln.Trainer(config, load=str(tmp_path / "save"))
    assert second.iteration == 4
    assert [step.loss for step in second.train()] == [step.loss for step in whole.history[4:]]


def test_a_loaded_checkpoint_is_the_trainer_s_model(trained: tuple[Path, ln.Trainer]) -> None:
    config, trainer = trained
    loaded = ln.load_checkpoint(config.parent / "checkpoints")
    assert (loaded.iteration, loaded.seq_length, loaded.path.name) == (6, 32, "global_step6")
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens)[0], trainer.model(tokens)[0])
    assert (
        ln.load_checkpoint(config.parent / "checkpoints", iteration=6, dtype="bf16").model.lm_head.weight.dtype
        == torch.bfloat16
    )


def test_generate_writes_what_the_command_writes(trained: tuple[Path, ln.Trainer], tmp_path: Path) -> None:
    config, trainer = trained
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the cat\n12 the\n")
    words = [
        str(config),
        "-i",
        str(prompts),
        "-o",
        str(tmp_path / "out.jsonl"),
        "--set",
        f"load={config.parent / 'checkpoints'}",
    ]
    generate_command.main([*words, "--set", "maximum_tokens=9", "--set", "temperature=0.8", "--set", "seed=3"])
    rows = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    loaded = ln.load_checkpoint(config.parent / "checkpoints")
    assert ln.generate(loaded, ["the cat", "12 the"], max_new_tokens=9, temperature=0.8, seed=3) == rows
    assert ln.generate(trainer, "the cat", max_new_tokens=9, temperature=0.8, seed=3) == rows[0]
    assert (
        ln.generate(loaded.model, "the cat", tokenizer=loaded.tokenizer, max_new_tokens=9, temperature=0.8, seed=3) == rows[0]
    )


def test_perplexity_is_the_command_s(trained: tuple[Path, ln.Trainer], tmp_path: Path) -> None:
    config, _ = trained
    words = [
        f"load={config.parent / 'checkpoints'}",
        f"eval_results_prefix={tmp_path / 'eval'}",
        "eval_stride=8",
        "eval_split=test",
    ]
    sets = [word for setting in words for word in ("--set", setting)]
    eval_command.main([str(config), "--eval_tasks", "perplexity", *sets])
    (file,) = tmp_path.glob("eval*.json")
    row = json.loads(file.read_text())["rows"][0]
    tokens = ln.read_tokens(config.parent / "text_document", split="80, 10, 10", name="test")
    score = ln.perplexity(ln.load_checkpoint(config.parent / "checkpoints"), tokens, stride=8)
    assert (score.nll, score.tokens, score.length) == (row["nll"], row["tokens"], row["length"])
    text = ln.perplexity(ln.load_checkpoint(config.parent / "checkpoints"), "the cat sat")
    assert text.tokens == 11


def test_a_model_starts_from_the_numbers_of_training(trained: tuple[Path, ln.Trainer]) -> None:
    config, _ = trained
    begin = ln.Trainer(config).engine.weights()
    model = ln.build_model(config)
    assert model.training
    for name, value in begin.items():
        assert torch.equal(model.state_dict()[name], value), name
    assert not torch.equal(ln.build_model(config, seed=7).lm_head.weight, model.lm_head.weight)
    assert ln.count_parameters(config)[0] == sum(p.numel() for p in model.parameters())


def test_a_model_from_a_mapping_and_from_a_model_config() -> None:
    keys = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "seq_length": 16,
        "attention_config": [[["based"], 2]],
    }
    shape = ln.model_config({**keys, "tokenizer_type": "CharLevelTokenizer"})
    assert shape.layer_types == ("based", "based") and shape.vocab_size % 128 == 0
    assert ln.model_config(keys, vocab_size=80).vocab_size == 80
    model = ln.build_model(shape, dtype="bf16")
    assert next(model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ln.UserError, match="frozen"):
        ln.model_config(ln.load_config(keys, check=False), vocab_size=80, num_layers=3)


@pytest.mark.slow
def test_export_and_import_carry_the_model(trained: tuple[Path, ln.Trainer], tmp_path: Path) -> None:
    _, trainer = trained
    exported = ln.export_hf(trainer.save(tmp_path / "save"), tmp_path / "hf")
    assert exported.difference < 1e-5 and (tmp_path / "hf" / "model.safetensors").is_file()
    back = ln.load_checkpoint(ln.import_hf(tmp_path / "hf", tmp_path / "back").checkpoint)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        rows = back.model.config.vocab_size
        assert torch.allclose(back.model(tokens)[0], trainer.model(tokens)[0][..., :rows], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: ln.generate(t, "a", temprature=1.0), "temprature"),
        (lambda t: ln.generate(t.model, "a"), "no tokenizer"),
        (lambda t: ln.perplexity(t.model, "a", tokenizer=t.tokenizer), "no length"),
        (lambda t: ln.load_config("configs/metalla.yml"), "not found"),
        (lambda t: ln.build_model(t.config, dtype="fp8"), "unknown dtype"),
        (lambda t: ln.load_checkpoint("/nowhere"), "not a checkpoint"),
    ],
)
def test_a_mistake_is_one_message(trained: tuple[Path, ln.Trainer], call: object, words: str) -> None:
    with pytest.raises(ln.UserError, match=words):
        call(trained[1])  # type: ignore[operator]


def test_a_trainer_refuses_a_mesh(trained: tuple[Path, ln.Trainer]) -> None:
    with pytest.raises(ln.UserError, match="needs 2 processes"):
        ln.Trainer(load_config([trained[0]], overrides={"model_parallel_size": 2}, world_size=2))


def test_data_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    path = ln.tokenize_files(tmp_path / "a.txt", tmp_path / "mine", tokenizer_type="CharLevelTokenizer")
    tokens = ln.read_tokens(path, split="1, 0, 0", name="train")
    assert ln.load_tokenizer("CharLevelTokenizer").detokenize(tokens[:-1].tolist()) == "the cat sat on the mat"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "last"), [("train_metala", "of the checkpoint's"), ("add_a_mixer", "convolution + ")])
def test_the_examples_run(name: str, last: str, tmp_path: Path) -> None:
    if name == "train_metala":
        _small_corpus(tmp_path / "data")
    small = {"STEPS": "3", "WORK": str(tmp_path / "work"), "DATA": str(tmp_path / "data"), "EPOCHS": "1", "EXAMPLES": "64"}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    env = {**os.environ, **small, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert last in done.stdout.splitlines()[-1]


def _small_corpus(folder: Path) -> None:
    """What `prepare_data("pystdlib")` finds there and takes for its own: the real one takes most of a minute to make."""
    from megatron.data import corpora
    from megatron.data.corpus_request import CorpusRequest

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        sources = ROOT / "megatron" / "config"
        patched.setattr(corpora.sysconfig, "get_path", lambda name: str(sources))
        patched.setattr(corpora, "PYSTDLIB_VOCABULARY", 400)
        corpora.prepare("pystdlib", CorpusRequest(folder))
