"""What a tokenizer's files store beside its ids does not reach the users of an exported folder."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

from megatron.data.tokenizers import Tokenizer, build_tokenizer
from megatron.export.hf import export_checkpoint
from megatron.export.tokenizer import SAMPLES, export_tokenizer
from megatron.generation.load import stored_tokenizer
from tests.data.hf_files import DOCUMENTS, LENGTHS, around, write

TEXTS = [*DOCUMENTS, *SAMPLES, "a<|endoftext|> b", "<s> and </s>"]


def all_of_them(made: Backend) -> None:
    made.enable_truncation(16)
    made.enable_padding(pad_id=1, pad_token="<|padding|>", length=40)
    made.model.dropout = 0.5  # type: ignore[attr-defined]


def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, output = tmp_path / "tokenizer", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    return source, output


def exported(source: Path, output: Path, kind: str | None = "HFTokenizer") -> tuple[Any, Tokenizer, list[str]]:
    """(the folder's tokenizer, that of training, the notes)."""
    notes = export_tokenizer(source, {} if kind is None else {"type": kind}, output, 128)
    tokenizer = stored_tokenizer(source, kind)
    assert tokenizer is not None
    return AutoTokenizer.from_pretrained(output), tokenizer, notes


def assert_prompts(loaded: Any, tokenizer: Tokenizer, output: Path) -> None:
    """Alone, in a batch, and through the `tokenizers` library alone: always the ids of a prompt."""
    wanted = [tokenizer.tokenize_prompt(text) for text in TEXTS]
    assert [loaded(text)["input_ids"] for text in TEXTS] == loaded(TEXTS)["input_ids"] == wanted
    bare = Backend.from_file(str(output / "tokenizer.json"))
    assert [encoding.ids for encoding in bare.encode_batch(TEXTS)] == wanted


@pytest.mark.parametrize("kind", ["HFTokenizer", "HFGPT2Tokenizer"])
def test_stored_settings_stay_behind(kind: str, tmp_path: Path) -> None:
    source, output = folders(tmp_path)
    write(source / "tokenizer.json", all_of_them)
    if kind == "HFGPT2Tokenizer":
        stored = {"max_length": 16, "stride": 2, "truncation_strategy": "longest_first", "pad_to_multiple_of": 64}
        (source / "tokenizer_config.json").write_text(
            json.dumps({**stored, "truncation_side": "left", "padding_side": "right"})
        )
    loaded, tokenizer, notes = exported(source, output, kind)
    assert_prompts(loaded, tokenizer, output)
    assert [len(loaded(text)["input_ids"]) for text in DOCUMENTS] == LENGTHS and "equal to training" in notes[0]
    content = json.loads((output / "tokenizer.json").read_text())
    assert content["truncation"] is None and content["padding"] is None and content["model"]["dropout"] is None
    settings = json.loads((output / "tokenizer_config.json").read_text())
    assert set(settings).isdisjoint({"max_length", "stride", "truncation_strategy", "truncation_side", "pad_to_multiple_of"})
    assert settings["padding_side"] == "left" and settings["model_max_length"] == 128
    batch = loaded(DOCUMENTS, padding=True)["input_ids"]
    assert {len(row) for row in batch} == {181} and batch[3][:180] == [1] * 180


@pytest.mark.parametrize("processor", ["template", "bert", "roberta", "in a row"])
def test_prompts_stay_open(processor: str, tmp_path: Path) -> None:
    source, output = folders(tmp_path)

    def change(made: Backend) -> None:
        around("<s>", "</s>")(made)
        template = made.post_processor
        made.post_processor = {
            "template": template,
            "bert": processors.BertProcessing(("</s>", 271), ("<s>", 270)),
            "roberta": processors.RobertaProcessing(("</s>", 271), ("<s>", 270)),
            "in a row": processors.Sequence([processors.ByteLevel(trim_offsets=False), template]),
        }[processor]

    write(source / "t.json", change)
    loaded, tokenizer, notes = exported(source, output)
    assert_prompts(loaded, tokenizer, output)
    assert loaded("x")["input_ids"] == [270, *tokenizer.tokenize_piece("x")] == tokenizer.tokenize("x")[:-1]
    assert loaded("x", add_special_tokens=False)["input_ids"] == tokenizer.tokenize_piece("x")
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "<|endoftext|>")
    assert [
        note for note in notes if "every document ended with </s>" in note and "to complete documents yourself" in note
    ] == notes[1:]
    kept = json.loads((output / "tokenizer.json").read_text())["post_processor"]
    assert [part["type"] for part in kept["processors"]] == ["ByteLevel"] * (processor == "in a row") + ["TemplateProcessing"]


def test_an_end_alone_leaves_no_template(tmp_path: Path) -> None:
    source, output = folders(tmp_path)
    write(source / "t.json", around("", "<|endoftext|>"))
    loaded, tokenizer, notes = exported(source, output)
    assert_prompts(loaded, tokenizer, output)
    assert loaded("x")["input_ids"] == tokenizer.tokenize("x")[:-1] and loaded.bos_token is None and len(notes) == 2


def test_a_start_comes_along_unchanged(tmp_path: Path) -> None:
    source, output = folders(tmp_path)
    path = write(source / "t.json", around("<s>", ""))
    loaded, tokenizer, notes = exported(source, output)
    assert_prompts(loaded, tokenizer, output)
    processor = [json.loads(file.read_text())["post_processor"] for file in (path, output / "tokenizer.json")]
    assert processor[0] == processor[1] and len(notes) == 1


HOSTILE = {
    "tokenizer_class": "LlamaTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_other.Other", None]},
    "add_bos_token": True,
    "add_eos_token": True,
    "add_prefix_space": True,
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": True,
    "unk_token": "<unknown to the file>",
    "mask_token": {"__type": "AddedToken", "content": "<mask, too>", "lstrip": True},
    "additional_special_tokens": ["<new>", "<s>"],
    "added_tokens_decoder": {"500": {"content": "<at 500>", "special": True}},
    "bos_token": {"content": "<s>"},
    "eos_token": "</s>",
    "chat_template": "{{ messages }}",
    "model_max_length": 77,
}


@pytest.mark.parametrize("before", ["", "<s>"])
def test_settings_of_a_folder_do_not_change_its_ids(before: str, tmp_path: Path) -> None:
    """Each of them would make AutoTokenizer give other ids than training, or not load; the rest is kept."""
    source, output = folders(tmp_path)
    template = around(before, "</s>")
    write(source / "tokenizer.json", lambda made: (made.add_special_tokens(["<s>", "</s>"]), template(made)))
    (source / "tokenizer_config.json").write_text(json.dumps(HOSTILE))
    (source / "special_tokens_map.json").write_text(json.dumps({"sep_token": "<also new>", "cls_token": "<s>"}))
    loaded, tokenizer, notes = exported(source, output, "HFGPT2Tokenizer")
    assert_prompts(loaded, tokenizer, output)
    others = "<unknown to the file> <mask, too> <new> <at 500> <also new>"
    assert loaded(others)["input_ids"] == tokenizer.tokenize_prompt(others) and len(loaded) == tokenizer.vocab_size
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (270, 271, 1)
    assert loaded.cls_token == "<s>" and loaded.unk_token is None and loaded.model_max_length == 77
    assert loaded.chat_template == "{{ messages }}" and "every document ended with </s>" in notes[1]
    assert loaded.decode(tokenizer.tokenize("a , b")) == tokenizer.detokenize(tokenizer.tokenize("a , b"))


def test_a_folder_gets_the_padding_token_of_training(tmp_path: Path) -> None:
    """Training gave it one; a folder that is padded in batches needs it, too."""
    source, output = folders(tmp_path)
    write(source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": "[PAD]"}))
    loaded, tokenizer, _ = exported(source, output, "HFGPT2Tokenizer")
    assert loaded.pad_token_id == tokenizer.pad == 270 and loaded(["a", "a cat"], padding=True)["input_ids"][0][0] == 270


@pytest.mark.parametrize("rows", [270, 271])
def test_no_padding_token_without_a_row(rows: int, tmp_path: Path) -> None:
    """Reading an imported folder adds one behind a vocabulary whose model has no row for it."""
    source, output = folders(tmp_path)
    write(source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "pad_token": "[PAD]"}))
    notes = export_tokenizer(source, {"type": "HFGPT2Tokenizer", "vocab_size": rows}, output, None)
    loaded = AutoTokenizer.from_pretrained(output)
    assert (len(loaded), loaded.pad_token_id) == ((270, 0) if rows == 270 else (271, 270)) and len(notes) == 1
    assert loaded(["a", "a cat"], padding=True)["input_ids"][0][0] < rows


def test_ids_that_the_model_has_no_row_for(tmp_path: Path) -> None:
    source, output = folders(tmp_path)
    write(source / "t.json")
    notes = export_tokenizer(source, {"type": "HFTokenizer", "vocab_size": 200}, output, None)
    assert notes[1:] == ["tokenizer: its ids 200 to 269 have no row in the model"]


def test_ids_with_a_gap(tmp_path: Path) -> None:
    source, output = folders(tmp_path)

    def edit(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["Zz"] = 969
        content["model"]["merges"].append(["Z", "z"])

    write(source / "t.json", edit=edit)
    loaded, tokenizer, notes = exported(source, output)
    assert_prompts(loaded, tokenizer, output)
    assert loaded("Zz")["input_ids"] == [969] and "970 ids" in notes[0]


def rank_file(folder: Path, special: dict[str, int]) -> None:
    """Bytes and some longer tokens; ids between the ranks and the special tokens stay empty."""
    longer = [b"th", b"the", b" t", b" the", b" c", b" ca", b" cat", b"\xe4\xbd\xa0", b"12", b"123", b"at"]
    tokens = [*(bytes([byte]) for byte in range(256)), b"\xe4\xbd", *longer]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "r.tiktoken").write_text("".join(lines))
    (folder / "r.tiktoken.json").write_text(json.dumps({"special_tokens": special, "vocab_size": 320}))


@pytest.mark.parametrize("kind", ["TiktokenTokenizer", None])
def test_rank_file(kind: str | None, tmp_path: Path) -> None:
    source, output = folders(tmp_path)
    rank_file(source, {"<|endoftext|>": 300, "<|padding|>": 311})
    loaded, tokenizer, notes = exported(source, output, kind)
    assert tokenizer.name == "TiktokenTokenizer" and "equal to training" in notes[0]
    assert_prompts(loaded, tokenizer, output)
    assert loaded("the the cat<|endoftext|>")["input_ids"] == [258, 260, 263, 300]
    assert (loaded.eos_token_id, loaded.pad_token_id) == (300, 311)
    assert loaded.decode(tokenizer.tokenize(SAMPLES[1])) == SAMPLES[1]


def test_a_folder_that_cannot_be_read_does_not_end_prompts_either(tmp_path: Path) -> None:
    """A slow tokenizer's folder is handed on; only what would end prompts is changed, and said."""
    source, output = folders(tmp_path)
    (source / "tokenizer_config.json").write_text(json.dumps({"add_eos_token": True, "add_bos_token": True, "legacy": False}))
    (source / "words.txt").write_text("x")
    notes = export_tokenizer(source, {"type": "HFGPT2Tokenizer"}, output, None)
    settings = json.loads((output / "tokenizer_config.json").read_text())
    assert settings == {"add_eos_token": False, "add_bos_token": True, "legacy": False} and (output / "words.txt").is_file()
    assert "cannot be written" in notes[0] and "add_eos_token was disabled" in notes[1]


def test_settings_that_transformers_cannot_read(tmp_path: Path) -> None:
    """The files of training are handed on then, and none of ours stays."""
    source, output = folders(tmp_path)
    write(source / "tokenizer.json")
    given = {"eos_token": "<|endoftext|>", "model_max_length": {"not": "a number"}, "extra_special_tokens": 7}
    (source / "tokenizer_config.json").write_text(json.dumps(given))
    notes = export_tokenizer(source, {"type": "HFGPT2Tokenizer"}, output, None)
    assert "cannot be written" in notes[0]
    assert json.loads((output / "tokenizer_config.json").read_text()) == given


def test_the_model_starts_where_its_tokenizer_does(tmp_path: Path, make_checkpoint: Any) -> None:
    """`generate` without a prompt begins with the token that starts every document."""
    path = write(tmp_path / "t.json", around("<s>", "</s>"))
    tokenizer = build_tokenizer("HFTokenizer", path)
    special = {"bos": tokenizer.bos, "eod": tokenizer.eod, "pad": tokenizer.pad}
    facts = {"tokenizer": {"type": "HFTokenizer", "vocab_size": tokenizer.vocab_size, **special}}
    folder = export_checkpoint(make_checkpoint(facts=facts, vocab_size=280), tmp_path / "hf").folder
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (270, 0, 1)
