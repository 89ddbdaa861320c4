"""A tokenizer file as people have it, through the whole job: corpus, training, text, exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from megatron.checkpoint.manifest import read_manifest
from megatron.data.indexed import IndexedDataset
from tests.data.hf_files import SENTENCE, around, write
from tests.export.modules_cache import use_private_modules_cache
from tests.test_main_job import run
from tests.tiny_run import write_run


def as_saved_by_its_last_user(made: Backend) -> None:
    around("<s>", "</s>")(made)
    made.enable_truncation(16)
    made.enable_padding(pad_id=1, pad_token="<|padding|>", length=40)
    made.model.dropout = 0.2  # type: ignore[attr-defined]


def with_a_gap(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["Zz"] = 900
    content["model"]["merges"].append(["Z", "z"])


@pytest.mark.slow
def test_from_text_to_text(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", edit=with_a_gap)
    made = Backend.from_file(str(path))
    as_saved_by_its_last_user(made)
    made.save(str(path))
    texts = [f"Zz {i} {SENTENCE * 6}" for i in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    flags = ("--tokenizer-type", "HFTokenizer", "--vocab-file", path, "--append-eod", "--output-prefix", tmp_path / "c")
    said = run("tools/datasets/preprocess_data.py", "--input", tmp_path / "in.jsonl", *flags, here=True)
    assert said.count("the tokenizer's template adds <s> at the start and </s> at the end of each document") == 1
    first = IndexedDataset(tmp_path / "c_text_document").get(0).tolist()
    assert (first[:2], first[-2:], len(first)) == ([271, 900], [272, 0], 43)

    save = tmp_path / "run" / "checkpoints"
    values = {"data_path": str(tmp_path / "c_text_document"), "tokenizer_type": "HFTokenizer", "vocab_file": str(path)}
    places = {"run_dir": str(tmp_path / "run"), "save": str(save), "load": str(save)}
    config = write_run(tmp_path / "config", **values, **places, train_iters=40, checkpoint_factor=40, seq_length=64)
    run("train.py", config, here=True)
    facts = read_manifest(save / "global_step40").facts["tokenizer"]
    assert (facts["vocab_size"], facts["bos"], facts["eod"], facts["pad"]) == (901, 271, 0, 1)

    (tmp_path / "prompts.txt").write_text("Zz 7 the cat\nsat on\n")
    run("generate.py", config, "-i", tmp_path / "prompts.txt", "--set", "maximum_tokens=12", here=True)
    written = [json.loads(line)["text"] for line in (tmp_path / "prompts.txt.output.jsonl").read_text().splitlines()]
    assert len(written) == 2 and all("the" in text for text in written), written

    told = run("tools/convert_to_hf.py", "--checkpoint", save / "global_step40", "--output", tmp_path / "hf", here=True)
    assert "every document ended with </s>" in told
    from transformers import AutoModelForCausalLM, AutoTokenizer

    use_private_modules_cache()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert model.config.vocab_size == 901 and len(tokenizer("Zz 7 the cat")["input_ids"]) == 6
    batch = tokenizer(["Zz 7 the cat", "sat on"], return_tensors="pt", padding=True)
    new = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
    ends = [row.index(0) if 0 in row else len(row) for row in new]
    assert [tokenizer.decode(row[:end]) for row, end in zip(new, ends, strict=True)] == written


@pytest.mark.slow
def test_a_vocabulary_without_special_tokens_trains_and_is_saved(tmp_path: Path) -> None:
    """It cannot say what ends or pads a text; a run needs neither."""
    path = tmp_path / "t.json"
    path.write_text(write(tmp_path / "plain.json").read_text().replace("<|endoftext|>", "<a>").replace("<|padding|>", "<b>"))
    (tmp_path / "in.txt").write_text(SENTENCE * 60)
    flags = ("--tokenizer-type", "HFTokenizer", "--vocab-file", path, "--output-prefix", tmp_path / "c")
    run("tools/datasets/preprocess_data.py", "--input", tmp_path / "in.txt", *flags, here=True)
    values = {"data_path": str(tmp_path / "c_text_document"), "tokenizer_type": "HFTokenizer", "vocab_file": str(path)}
    places = {"run_dir": str(tmp_path / "run"), "save": str(tmp_path / "run"), "split": "100,0,0"}
    run("train.py", write_run(tmp_path / "config", **values, **places, train_iters=2, checkpoint_factor=2), here=True)
    facts = read_manifest(tmp_path / "run" / "global_step2").facts["tokenizer"]
    assert (facts["eod"], facts["pad"], facts["vocab_size"]) == (None, None, 270)
