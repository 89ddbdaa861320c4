"""What else a `tokenizer.json` stores: settings of its last call change nothing, its template is kept, ids may have gaps."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from megatron.data.encode import EncodeJob, encode_corpus
from megatron.data.indexed import IndexedDataset
from megatron.synthetics.number_tokenizer import NumberTokenizer
from megatron.data.tokenizers import HFGPT2Tokenizer, HFTokenizer, Template, build_tokenizer, padded_vocab_size
from megatron.errors import DataError
from megatron.files import sha256_of
from tests.data.hf_files import DOCUMENTS, LENGTHS, around, write
from tools.datasets.preprocess_data import parser, run

Change = Callable[[Backend], Any]


def truncation(**more: Any) -> Change:
    return lambda made: made.enable_truncation(16, **more)


def padding(**more: Any) -> Change:
    return lambda made: made.enable_padding(pad_id=1, pad_token="<|padding|>", **more)


def all_of_them(made: Backend) -> None:
    truncation()(made)
    padding(length=40)(made)
    made.model.dropout = 0.5  # type: ignore[attr-defined]


STORED: dict[str, tuple[Change, list[str]]] = {
    "truncation": (truncation(), ["truncation to 16 tokens"]),
    "truncation on the left": (truncation(direction="left", stride=2), ["truncation to 16 tokens"]),
    "only the first": (truncation(strategy="only_first"), ["truncation to 16 tokens"]),
    "padding": (padding(length=40), ["padding to 40"]),
    "padding of the batch": (padding(direction="left"), ["padding to the longest text"]),
    "padding to a multiple": (padding(pad_to_multiple_of=64), ["padding to the longest text"]),
    "dropout": (lambda made: setattr(made.model, "dropout", 0.5), ["a byte-pair dropout of 0.5"]),
    "all": (all_of_them, ["truncation to 16 tokens", "padding to 40", "a byte-pair dropout of 0.5"]),
}


def corpus(vocab_file: Path, prefix: Path, documents: list[str], workers: int = 1) -> None:
    """What the command does."""
    source = prefix.with_suffix(".jsonl")
    source.write_text("".join(f"{json.dumps({'text': text})}\n" for text in documents), encoding="utf-8")
    flags = ["--input", str(source), "--tokenizer-type", "HFTokenizer", "--vocab-file", str(vocab_file), "--append-eod"]
    run(parser().parse_args([*flags, "--output-prefix", str(prefix), "--workers", str(workers)]))


def documents_of(prefix: Path) -> list[list[int]]:
    indexed = IndexedDataset(f"{prefix}_text_document")
    return [indexed.get(i).tolist() for i in range(len(indexed))]


@pytest.mark.parametrize("name", STORED)
def test_stored_settings_change_no_token(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, said = STORED[name]
    files = {"plain": write(tmp_path / "plain.json"), "stored": write(tmp_path / "stored.json", change)}
    plain, stored = (build_tokenizer("HFTokenizer", path) for path in files.values())
    assert [len(plain.tokenize(text)) for text in DOCUMENTS] == LENGTHS
    for _ in range(5):  # dropout would not repeat itself
        assert [stored.tokenize(text) for text in DOCUMENTS] == [plain.tokenize(text) for text in DOCUMENTS]
        assert stored.tokenize_batch(DOCUMENTS) == plain.tokenize_batch(DOCUMENTS)
        assert [stored.tokenize_prompt(text) for text in DOCUMENTS] == plain.tokenize_batch(DOCUMENTS)
    caplog.clear()
    for kind, path in files.items():
        corpus(path, tmp_path / kind, DOCUMENTS)
    for suffix in (".bin", ".idx"):
        one, other = (tmp_path / f"{kind}_text_document{suffix}" for kind in files)
        assert one.read_bytes() == other.read_bytes()
    assert [len(ids) for ids in documents_of(tmp_path / "stored")] == [length + 1 for length in LENGTHS]
    lines = [record.message for record in caplog.records if "which is not used" in record.message]
    assert lines == [f"the tokenizer's file stores {what}, which is not used" for what in said]


@pytest.mark.slow
def test_workers_do_not_cut_either(tmp_path: Path) -> None:
    documents = DOCUMENTS * 100
    for kind, change in (("plain", None), ("stored", all_of_them)):
        corpus(write(tmp_path / f"{kind}.json", change), tmp_path / kind, documents, workers=2)
    assert documents_of(tmp_path / "stored") == documents_of(tmp_path / "plain")


def named(*tokens: str) -> Change:
    return lambda made: made.add_special_tokens(list(tokens))


def with_processor(processor: Any) -> Change:
    def change(made: Backend) -> None:
        made.add_special_tokens(["<s>", "</s>"])  # 270 and 271
        made.post_processor = processor

    return change


TEMPLATES: dict[str, tuple[Change, Template]] = {
    "none": (lambda made: None, Template()),
    "offsets": (with_processor(processors.ByteLevel(trim_offsets=False)), Template()),
    "start": (around("<s>"), Template((270,))),
    "end": (around("", "</s>"), Template((), (270,))),
    "both": (around("<s>", "</s>"), Template((270,), (271,))),
    "the same": (around("<|endoftext|>", "<|endoftext|>"), Template((0,), (0,))),
    "several": (around("<s> <lang>", "</s> <|endoftext|>"), Template((270, 271), (272, 0))),
    "bert": (with_processor(processors.BertProcessing(("</s>", 271), ("<s>", 270))), Template((270,), (271,))),
    "roberta": (with_processor(processors.RobertaProcessing(("</s>", 271), ("<s>", 270))), Template((270,), (271,))),
    "in a row": (
        with_processor(
            processors.Sequence(
                [processors.ByteLevel(), processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 271)])]
            )
        ),
        Template((), (271,)),
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_starts_prompts_and_does_not_end_them(name: str, tmp_path: Path) -> None:
    change, template = TEMPLATES[name]
    plain = build_tokenizer("HFTokenizer", write(tmp_path / "plain.json"))
    tokenizer = build_tokenizer("HFTokenizer", write(tmp_path / "t.json", change))
    before, after = list(template.before), list(template.after)
    assert tokenizer.template == template and tokenizer.bos == (before[0] if before else None)
    # the last text ends with the token that ends documents: it was written, and stays
    for text in [*DOCUMENTS, "", "a<|endoftext|>"]:
        ids = plain.tokenize(text)
        assert tokenizer.tokenize(text) == [*before, *ids, *after]
        assert tokenizer.tokenize_prompt(text) == [*before, *ids]
        assert tokenizer.tokenize_piece(text) == ids
    assert tokenizer.tokenize_batch(DOCUMENTS) == [tokenizer.tokenize(text) for text in DOCUMENTS]


def test_tokenizers_without_a_template(tmp_path: Path) -> None:
    for tokenizer, text in ((build_tokenizer("CharLevelTokenizer"), "a b"), (NumberTokenizer(9), "1 2")):
        assert tokenizer.template == Template() and tokenizer.bos is None and tokenizer.remarks(append_eod=True) == []
        assert tokenizer.tokenize(text) == tokenizer.tokenize_prompt(text) == tokenizer.tokenize_piece(text)


@pytest.mark.parametrize(
    ("before", "after", "append_eod", "line"),
    [
        ("<s>", "</s>", False, "adds <s> at the start and </s> at the end of each document"),
        ("<s>", "", False, "adds <s> at the start of each document"),
        ("", "</s>", False, "adds </s> at the end of each document"),
        ("<s> <lang>", "", False, "adds <s> <lang> at the start of each document"),
        (
            "<s>",
            "</s>",
            True,
            "adds <s> at the start and </s> at the end of each document;"
            " the end-of-document token <|endoftext|> is appended behind it",
        ),
        (
            "",
            "<|endoftext|>",
            True,
            "adds <|endoftext|> at the end of each document; a second <|endoftext|> is appended behind it",
        ),
    ],
)
def test_the_template_is_said_in_one_line(before: str, after: str, append_eod: bool, line: str, tmp_path: Path) -> None:
    tokenizer = build_tokenizer("HFTokenizer", write(tmp_path / "t.json", around(before, after)))
    assert tokenizer.remarks(append_eod) == [f"the tokenizer's template {line}"]


def test_a_corpus_holds_what_the_template_adds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = build_tokenizer("HFTokenizer", write(tmp_path / "plain.json"))
    corpus(write(tmp_path / "t.json", around("<s>", "</s>")), tmp_path / "c", [*DOCUMENTS, ""])
    expected = [[270, *plain.tokenize(text), 271, 0] for text in DOCUMENTS]
    assert documents_of(tmp_path / "c") == expected
    assert len([r for r in caplog.records if "template adds <s> at the start and </s> at the end" in r.message]) == 1
    assert all(record.levelno == logging.WARNING for record in caplog.records if "template" in record.message)


def with_ids(**tokens: int) -> Callable[[dict[str, Any]], Any]:
    """An edit that puts tokens into the vocabulary, and the merge of the first, `Zz`."""

    def edit(content: dict[str, Any]) -> None:
        content["model"]["vocab"] |= tokens
        content["model"]["merges"].append(["Z", "z"])

    return edit


def test_the_vocabulary_ends_behind_its_largest_id(tmp_path: Path) -> None:
    path = write(tmp_path / "gap.json", edit=with_ids(Zz=969))
    tokenizer = build_tokenizer("HFTokenizer", path)
    assert (tokenizer.vocab_size, tokenizer.tokenize("a Zz")[-1], tokenizer.detokenize([969])) == (970, 969, "Zz")
    assert padded_vocab_size(tokenizer.vocab_size, 128, 2) == 1024
    # A corpus or checkpoint of this file knows it by the number of its tokens.
    identity = "\n".join(("HFTokenizer", "271", f"gap.json:{sha256_of(path)}"))
    assert tokenizer.fingerprint() == hashlib.sha256(identity.encode()).hexdigest()
    corpus(path, tmp_path / "c", DOCUMENTS)
    assert IndexedDataset(str(tmp_path / "c_text_document")).get(2).tolist()[0] == 969
    assert json.loads((tmp_path / "c_text_document.meta.json").read_text())["tokenizer"]["vocab_size"] == 970


def test_ids_beyond_16_bits_are_written_whole(tmp_path: Path) -> None:
    """Few tokens, large ids: the number of tokens would have chosen too small a type."""
    corpus(write(tmp_path / "gap.json", edit=with_ids(Zz=70000)), tmp_path / "c", ["Zz"])
    assert documents_of(tmp_path / "c") == [[70000, 0]]


def test_an_added_token_whose_id_the_library_changes_is_named(tmp_path: Path) -> None:
    token = {"id": 770, "content": "<extra>", "special": True}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = build_tokenizer("HFTokenizer", write(tmp_path / "t.json", edit=lambda c: c["added_tokens"].append(token)))
    assert tokenizer.tokenize("<extra>") == [270] and tokenizer.vocab_size == 271
    assert tokenizer.remarks() == ["<extra> has the id 770 in the tokenizer's file, the tokenizers library gives it 270"]


def taken_id(content: dict[str, Any]) -> None:
    """Take one id out of the vocabulary; the library then gives a new token the id of the last one."""
    del content["model"]["vocab"]["\u0100"]
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<new>"})


@pytest.mark.parametrize(
    ("change", "edit", "message"),
    [
        (None, taken_id, "two tokens have the id 269"),
        (None, with_ids(Zz=(1 << 31)), "a token has the id 2147483648"),
        (with_processor(processors.TemplateProcessing("$A <s> $A", special_tokens=[("<s>", 270)])), None, "hold the text once"),
        (around("<s>"), lambda c: c["post_processor"]["special_tokens"]["<s>"].update(ids=[999]), "adds the id 999"),
    ],
)
def test_files_that_would_spoil_a_corpus(change: Any, edit: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        build_tokenizer("HFTokenizer", write(tmp_path / "t.json", change, edit))


def folder(path: Path, change: Change | None = None, **settings: Any) -> HFGPT2Tokenizer:
    path.mkdir(exist_ok=True)
    write(path / "tokenizer.json", change)
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = build_tokenizer("HFGPT2Tokenizer", path)
    assert isinstance(tokenizer, HFGPT2Tokenizer)
    return tokenizer


def test_a_folder_stores_settings_too(tmp_path: Path) -> None:
    plain = folder(tmp_path / "plain")
    stored = folder(tmp_path / "stored", all_of_them, model_max_length=16, padding_side="left", truncation_side="left")
    assert stored.tokenize_batch(DOCUMENTS) == plain.tokenize_batch(DOCUMENTS)
    assert [len(stored.tokenize(text)) for text in DOCUMENTS] == LENGTHS
    assert len(stored.remarks()) == 3 and plain.remarks() == []


@pytest.mark.parametrize(
    ("change", "asked", "ids", "lines"),
    [
        (None, {"add_bos_token": True, "add_eos_token": True}, [], ["add_bos_token: true", "add_eos_token: true"]),
        (around("<s>", "</s>"), {"add_bos_token": True, "add_eos_token": False}, [270], ["add_eos_token: false"]),
        (around("<s>", "</s>"), {"add_bos_token": True, "add_eos_token": True}, [270], []),
        (around("<s>", "</s>"), {"add_bos_token": None}, [270], []),
    ],
)
def test_tokenizer_json_decides_what_a_folder_adds(
    change: Change | None, asked: dict[str, Any], ids: list[int], lines: list[str], tmp_path: Path
) -> None:
    tokenizer = folder(tmp_path / "f", change, **asked)
    assert tokenizer.tokenize_prompt("x")[:-1] == ids
    said = [line for line in tokenizer.remarks() if "decides" in line]
    assert said == [f"tokenizer_config.json's {line} is not used: tokenizer.json decides" for line in lines]


def test_special_tokens_of_a_folder(tmp_path: Path) -> None:
    """`tokenizer_config.json` comes first, what it leaves open is in `special_tokens_map.json`."""
    (tmp_path / "f").mkdir()
    names = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "pad_token": "<pad>"}
    (tmp_path / "f" / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = folder(tmp_path / "f", named("<s>", "</s>"), eos_token=None, pad_token="</s>", bos_token=None)
    assert (tokenizer.bos, tokenizer.eod, tokenizer.pad, tokenizer.vocab_size) == (270, 271, 271, 272)
    assert tokenizer.template == Template()  # a begin that is named is not added


def test_a_job_logs_the_lines_of_its_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever writes a corpus through the library sees them, not only the command."""
    (tmp_path / "in.txt").write_text("x")
    job = EncodeJob("HFTokenizer", str(write(tmp_path / "t.json", around("", "<|endoftext|>"))), append_eod=True)
    encode_corpus(job, [str(tmp_path / "in.txt")], str(tmp_path / "c"))
    assert "a second <|endoftext|> is appended behind it" in caplog.text
    assert documents_of(tmp_path / "c")[0][-2:] == [0, 0]


def test_text_of_a_token(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("HFTokenizer", write(tmp_path / "t.json", named("<s>")))
    assert isinstance(tokenizer, HFTokenizer) and tokenizer.token_text(270) == "<s>"
