"""The readers that are fuzzed: valid seeds for each, and what is done with a folder of them."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from megatron.config.cli import config_from_args, make_parser
from megatron.config.load import load_config
from megatron.data.checksums import write_checksums
from megatron.data.fingerprint import check_fingerprint
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.order_cache import cached_sample_index
from megatron.data.readers import RowReader, expand_inputs
from megatron.data.rows import row_texts
from megatron.data.tokenizers import build_tokenizer
from megatron.generation.text import read_prompts
from megatron.launch.hosts import read_hostfile
from megatron.settings import model_config
from tests.faults.memory_growth import CONFIG

TEXT = "Hello world, the cat sat on the mat. <|endoftext|> \u00e9\u4e2d \ud83d\ude00".encode("utf-16", "surrogatepass").decode(
    "utf-16"
)
SETS = """num_layers=2
optimizer.params.lr=3e-4
train_iters=100
split=90,5,5
attention_config=[[[metala],2]]
seed=7
zero_optimization.stage=1"""


@dataclass(frozen=True)
class Reader:
    """seeds: writes valid files into an empty folder. read: what a command does with it, results thrown away.

    resign: see `fuzz_mutate.folder`.
    """

    seeds: Callable[[Path], None]
    read: Callable[[Path], None]
    resign: Callable[[Path], None] | None = None


def _yaml_seeds(root: Path) -> None:
    (root / "a.yml").write_text(json.dumps({**CONFIG, "train_iters": 10, "data_path": "none", "run_dir": "r"}, indent=1))
    shutil.copy(Path(__file__).parents[2] / "configs/metala-quickstart.yml", root / "b.yml")


def _yaml(root: Path) -> None:
    for name in ("a.yml", "b.yml"):
        model_config(load_config([root / name], world_size=1), 512)


def _set_seeds(root: Path) -> None:
    _yaml_seeds(root)
    (root / "b.yml").unlink()
    (root / "a.yml").chmod(0o400)
    (root / "sets.txt").write_text(SETS)


def _set(root: Path) -> None:
    if not (root / "sets.txt").is_file():
        return
    lines = (root / "sets.txt").read_bytes().decode("utf-8", "surrogateescape").replace("\0", "").split("\n")
    words = [word for line in lines for word in ("--set", line)]
    model_config(config_from_args(make_parser("").parse_intermixed_args([str(root / "a.yml"), *words]), world_size=1), 512)


def _corpora_seeds(root: Path) -> None:
    lines = "".join(json.dumps({"text": f"{TEXT} {i}", "n": [i]}) + "\n" for i in range(8)).encode()
    (root / "a.jsonl").write_bytes(lines)
    (root / "b.txt").write_text(TEXT)
    (root / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    (root / "d.jsonl.zst").write_bytes(zstandard.compress(lines) * 2)


def _corpora(root: Path) -> None:
    for row in RowReader(expand_inputs([str(root)])):
        row_texts(row, ["text"])


def _indexed_seeds(root: Path) -> None:
    rng = np.random.default_rng(1)
    with IndexedWriter(root / "c", "uint16") as writer:
        for length in range(30):
            writer.add_document(rng.integers(0, 500, length))
    write_checksums(root / "c")
    cached_sample_index(root / "c", "train", range(30), IndexedDataset(root / "c").sizes, 16, 20, 1, small=0)


def _indexed(root: Path) -> None:
    corpus = IndexedDataset(root / "c")
    check_fingerprint(root / "c", build_tokenizer("CharLevelTokenizer"))
    corpus.check_vocabulary(512)
    corpus.document_borders()
    for index in range(min(40, len(corpus))):
        corpus.get(index)
    index = cached_sample_index(root / "c", "train", range(len(corpus)), corpus.sizes, 16, 20, 1, small=0)
    [index[i] for i in range(min(4, len(index)))] if hasattr(index, "__getitem__") else None


def _json_tokenizer_seeds(root: Path) -> None:
    from tests.data.hf_files import around, write

    write(root / "tokenizer.json", around("<|endoftext|>", "<|padding|>"))
    (root / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "pad_token": {"content": "<|padding|>"}})
    )


def _use(kind: str, path: Path) -> None:
    tokenizer = build_tokenizer(kind, path)
    ids = tokenizer.tokenize(TEXT)
    tokenizer.tokenize_batch([TEXT, ""])
    tokenizer.detokenize(ids)
    (tokenizer.eod, tokenizer.pad, tokenizer.bos, tokenizer.vocab_size, tokenizer.fingerprint(), list(tokenizer.remarks()))


def _json_tokenizer(root: Path) -> None:
    _use("HFGPT2Tokenizer", root)


def _tiktoken_seeds(root: Path) -> None:
    import base64

    tokens = [bytes([i]) for i in range(256)] + [b"he", b"ll", b" the"]
    (root / "a.tiktoken").write_bytes(b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens)))
    (root / "a.tiktoken.json").write_text(
        json.dumps({"special_tokens": {"<|endoftext|>": 259}, "vocab_size": 300, "pattern": r"\w+|\s"})
    )


def _tiktoken(root: Path) -> None:
    _use("TiktokenTokenizer", root / "a.tiktoken")


def _sentencepiece_seeds(root: Path) -> None:
    import sentencepiece

    texts = iter([f"{TEXT} {i} words of a small model" for i in range(200)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(root / "m"), vocab_size=80, minloglevel=2, hard_vocab_limit=False
    )
    (root / "m.vocab").unlink()


def _sentencepiece(root: Path) -> None:
    _use("SPMTokenizer", root / "m.model")


def _checkpoint_seeds(root: Path) -> None:
    from megatron.checkpoint.save import save_checkpoint
    from tests.checkpoint.fakes import MODEL, FakeEngine

    for step in (7, 9):
        save_checkpoint(root, FakeEngine(seed=step), {"iteration": step}, model_config=MODEL, config_texts={"a.yml": "x: 1"})


def _checkpoint(root: Path) -> None:
    """Where `damages` finds nothing in the newest one, a resume takes it."""
    from megatron.checkpoint.load import damages
    from megatron.checkpoint.resume import resume
    from megatron.errors import CheckpointError
    from tests.checkpoint.fakes import MODEL, FakeEngine

    whole = [step for step in (7, 9) if not damages(root / f"global_step{step}")]
    try:
        found = resume(root, FakeEngine(seed=1), model_config=MODEL)
    except CheckpointError as error:
        if "of another model" in error.what:
            return
        if whole:
            raise AssertionError(f"{whole} are whole, resume says: {error}") from error
        raise
    assert (
        found.path is None
        or not whole
        or found.path.name in {f"global_step{step}" for step in whole}
        or _texts_only(found.path)
    )


def _texts_only(path: Path) -> bool:
    """`verify` also reads the texts that no rank does."""
    from megatron.checkpoint.load import damages

    return all("configs/" in line or "a.yml" in line for line in damages(path))


def _sign(path: Path) -> None:
    from megatron.checkpoint.manifest import _digest

    try:
        body = json.loads(path.read_bytes())
        path.write_text(json.dumps({**body, "sha256": _digest(body)}))
    except (ValueError, TypeError, RecursionError, AttributeError):
        return


def _hf_seeds(root: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, **sizes))
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "many", max_shard_size="8KB")


def _hf(root: Path) -> None:
    from megatron.errors import ExportError
    from megatron.interop.import_hf import import_folder

    for name in ("one", "many"):
        try:
            import_folder(root / name, root / f"out-{name}")
        except ExportError:
            if name == "many":
                raise


def _neox_seeds(root: Path) -> None:
    from tests.interop.test_neox import CONFIG as NEOX
    from tests.interop.test_neox import neox_stages, random_weights, write_layers

    write_layers(root, neox_stages(NEOX, random_weights(NEOX), 2))


def _neox(root: Path) -> None:
    from megatron.interop.neox import read_neox_weights
    from tests.interop.test_neox import CONFIG as NEOX

    read_neox_weights(root / "global_step40", NEOX)


def _prompts_seeds(root: Path) -> None:
    (root / "prompts.txt").write_text(f"{TEXT}\n\nsecond\nthird\n")
    (root / "hosts").write_text("# hosts\nworker-0 slots=8\nworker-1 slots=4\n\n")


def _prompts(root: Path) -> None:
    if (root / "prompts.txt").is_file():
        read_prompts(root / "prompts.txt")


def _hostfile(root: Path) -> None:
    if (root / "hosts").is_file():
        list(itertools.islice(read_hostfile(str(root / "hosts")).items(), 10))


READERS: dict[str, Reader] = {
    "yaml": Reader(_yaml_seeds, _yaml),
    "set": Reader(_set_seeds, _set),
    "corpora": Reader(_corpora_seeds, _corpora),
    "indexed": Reader(_indexed_seeds, _indexed),
    "tokenizer-json": Reader(_json_tokenizer_seeds, _json_tokenizer),
    "tiktoken": Reader(_tiktoken_seeds, _tiktoken),
    "sentencepiece": Reader(_sentencepiece_seeds, _sentencepiece),
    "checkpoint": Reader(_checkpoint_seeds, _checkpoint, _sign),
    "hf": Reader(_hf_seeds, _hf),
    "neox": Reader(_neox_seeds, _neox),
    "prompts": Reader(_prompts_seeds, _prompts),
    "hostfile": Reader(_prompts_seeds, _hostfile),
}


def offline() -> None:
    """Nothing is asked of a network, and libraries start no threads before the cases are forked."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)  # a child that is forked beside threads of OpenMP waits for them
