"""A tokenizer whose template starts and ends texts: scores of a checkpoint equal those of stock lm-eval on its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from megatron.checkpoint.save import save_weights
from megatron.data.tokenizers import Tokenizer, build_tokenizer
from megatron.evaluation.documents import measured
from megatron.evaluation.forward import open_forward
from megatron.evaluation.lm_eval_model import HarnessLM
from megatron.evaluation.options import HarnessOptions
from megatron.export.hf import export_checkpoint
from megatron.generation.load import stored_tokenizer
from megatron.model.build import param_specs
from megatron.parallel.mesh import Mesh
from tests.data.hf_files import SENTENCE, around, write
from tests.evaluation.tiny import tiny_config
from tests.export.conftest import random_weights
from tests.export.modules_cache import use_private_modules_cache

LENGTH = 64


def checkpoint_of(folder: Path, vocab_file: Path) -> tuple[Path, Tokenizer]:
    """A random model that was "trained" with a tokenizer."""
    tokenizer = build_tokenizer("HFTokenizer", vocab_file)
    config = tiny_config("metala", "metala", vocab_size=tokenizer.vocab_size + 8)
    special = {"eod": tokenizer.eod, "pad": tokenizer.pad} | ({} if tokenizer.bos is None else {"bos": tokenizer.bos})
    facts = {"tokenizer": {"type": tokenizer.name, "vocab_size": tokenizer.vocab_size, **special}, "seq_length": LENGTH}
    return save_weights(
        folder,
        random_weights(config),
        param_specs(config),
        model_config=config.to_dict(),
        iteration=1,
        facts=facts,
        tokenizer={vocab_file.name: vocab_file},
    ), tokenizer


def requests(kind: str) -> list[Instance]:
    texts = ["the cat", "a mat on a mat", "x", "the cat sat on the", "<s>the cat", "<|endoftext|>the cat"]
    given: dict[str, list[tuple[Any, ...]]] = {
        "loglikelihood": [(text, f" {other}") for text in texts for other in ("sat", "mats")] + [("", "mat"), ("x ", "y")],
        "loglikelihood_rolling": [(text * 4,) for text in [*texts, SENTENCE * 10]],
        # stock looks at the first text of a batch to see whether it starts with the begin already
        "generate_until": [(text, {"until": ["\n"], "max_gen_toks": 12}) for text in texts if "<s>" not in text],
    }
    return [Instance(kind, {}, arguments, 0) for arguments in given[kind]]  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "after"), [("<s>", "</s>"), ("", "<|endoftext|>"), ("<s>", "")])
def test_scores_equal_stock(before: str, after: str, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    use_private_modules_cache()
    checkpoint, _ = checkpoint_of(tmp_path / "run", write(tmp_path / "t.json", around(before, after)))
    folder = export_checkpoint(checkpoint, tmp_path / "hf").folder
    stock = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float64", batch_size=2)
    forward, _ = open_forward(checkpoint, Mesh.single(), dtype=torch.float64)
    kept = stored_tokenizer(checkpoint / "tokenizer", "HFTokenizer")
    assert kept is not None
    ours = HarnessLM(forward, kept, HarnessOptions(LENGTH, 3))
    assert ours.prefix_token_id == stock.prefix_token_id == (270 if before else 0)
    for asked in ("loglikelihood", "loglikelihood_rolling"):
        one, other = (getattr(lm, asked)(requests(asked), disable_tqdm=True) for lm in (ours, stock))
        assert np.allclose(one, other, rtol=0, atol=1e-9), asked
    texts = [lm.generate_until(requests("generate_until"), disable_tqdm=True) for lm in (ours, stock)]
    assert texts[0] == texts[1] and any(texts[0])


def test_a_continuation_follows_its_context(tmp_path: Path) -> None:
    """Nothing that ends a text stands between them, and nothing that starts one before the continuation."""
    checkpoint, tokenizer = checkpoint_of(tmp_path / "run", write(tmp_path / "t.json", around("<s>", "</s>")))
    lm = HarnessLM(open_forward(checkpoint, Mesh.single())[0], tokenizer, HarnessOptions(LENGTH, 3))
    plain = build_tokenizer("HFTokenizer", write(tmp_path / "plain.json"))
    assert lm._encode_pair("the cat", " sat") == ([270, *plain.tokenize("the cat")], plain.tokenize(" sat"))
    assert lm.tok_encode("<s>the cat") == lm.tok_encode("the cat") == [270, *plain.tokenize("the cat")]
    assert lm.tok_encode("the cat", add_special_tokens=False) == plain.tokenize("the cat")
    assert lm.tok_encode("<s>a", add_special_tokens=True) == [270, 270, *plain.tokenize("a")]
    assert lm.tok_decode([270, *plain.tokenize("a cat"), 271, 0, 1]) == "a cat"


def test_what_a_template_adds_is_no_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("HFTokenizer", write(tmp_path / "t.json", around("<s>", "</s>")))
    texts = ["two words\n", "three more words"]
    tokens = [number for text in texts for number in (*tokenizer.tokenize(text), tokenizer.eod)]
    found = measured(np.asarray(tokens), tokenizer)
    assert (found.words, found.size) == (2 + 1 + 3, len("".join(texts))) and len(found.tokens) == len(tokens)
