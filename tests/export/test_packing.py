"""Packed documents on every family: logits, hidden states and gradients of documents in one row are those of each alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from tests.export.families import rows

Load = Callable[..., Any]
LENGTHS = (5, 1, 9, 16, 3)
"""Shorter and longer than JRT's prefix of 8, and one of a single token."""
DOCUMENTS = [{key: value[:n] for key, value in row.items()} for row, n in zip(rows(), LENGTHS, strict=False)]
TOTAL = sum(LENGTHS)
PLACES = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
ROW = torch.tensor([[token for document in DOCUMENTS for token in document["input_ids"]]])

WAYS: Mapping[str, Mapping[str, Any]] = {
    "position_ids": {"position_ids": PLACES},
    "cu_seq_lens": {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 16, "max_length_k": 16},
    "seq_idx": {"seq_idx": NUMBERS.to(torch.int32)},
}
COLLATORS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "flash": {"return_flash_attn_kwargs": True},
    "seq_idx": {"return_seq_idx": True},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    "no_positions": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "separator": {"separator_id": 1},
}


def one_by_one(model: Any) -> Tensor:
    """Logits [1, total, n] of the documents, each alone."""
    return torch.cat([model(torch.tensor([d["input_ids"]]), use_cache=False).logits for d in DOCUMENTS], 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use_cache", [False, True], ids=["pass", "cached"])
@torch.inference_mode()
def test_logits(load: Load, way: str, use_cache: bool) -> None:
    """Each of the ways in which boundaries are told; also where the state is kept."""
    model = load(torch.float64)
    got = model(ROW, use_cache=use_cache, **WAYS[way]).logits
    assert float((got - one_by_one(model)).abs().max()) < 1e-8


@pytest.mark.parametrize("options", COLLATORS)
@torch.inference_mode()
def test_flattening_collator(load: Load, options: str) -> None:
    """`DataCollatorWithFlattening` with each of its options."""
    model = load(torch.float64)
    batch = DataCollatorWithFlattening(return_tensors="pt", **COLLATORS[options])(DOCUMENTS)
    out = model(**batch, use_cache=False)
    assert float((out.logits - one_by_one(model)).abs().max()) < 1e-8
    assert bool(torch.isfinite(out.loss))


def test_gradients(load: Load) -> None:
    """Of every parameter: those of the summed losses of documents one by one."""
    packed, alone = load(torch.float64).train(), load(torch.float64).train()
    batch = DataCollatorWithFlattening(return_tensors="pt")(DOCUMENTS)
    count = sum(label != -100 for d in DOCUMENTS for label in d["labels"][1:])
    packed(**batch, num_items_in_batch=count).loss.backward()
    for document in DOCUMENTS:
        tokens, labels = torch.tensor([document["input_ids"]]), torch.tensor([document["labels"]])
        alone(tokens, labels=labels, num_items_in_batch=count).loss.backward()
    for (name, got), want in zip(packed.named_parameters(), alone.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None, name
        assert torch.allclose(got.grad, want.grad, atol=1e-9), name


def _two_rows(side: str) -> tuple[Tensor, Tensor, Tensor]:
    """The documents in two rows padded to one length: tokens, mask, position_ids (0 where there is padding)."""
    parts = [DOCUMENTS[:3], DOCUMENTS[3:]]
    length = max(sum(len(d["input_ids"]) for d in part) for part in parts)
    tokens, mask, places = (torch.zeros(2, length, dtype=torch.long) for _ in range(3))
    for i, part in enumerate(parts):
        row = [t for d in part for t in d["input_ids"]]
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, where], mask[i, where] = torch.tensor(row), 1
        places[i, where] = torch.cat([torch.arange(len(d["input_ids"])) for d in part])
    return tokens, mask, places


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
@torch.inference_mode()
def test_packed_and_padded_rows(load: Load, side: str, masked: bool) -> None:
    """Rows of packed documents, padded to one length; trainers that pack give positions and often no mask."""
    model = load(torch.float64)
    tokens, mask, places = _two_rows(side)
    got = model(tokens, attention_mask=mask if masked else None, position_ids=places, use_cache=False).logits
    assert float((got[mask == 1] - one_by_one(model)[0]).abs().max()) < 1e-8


@torch.inference_mode()
def test_the_last_document_goes_on(load: Load) -> None:
    """After a packed row the cache holds the last document: it is continued as if it stood alone."""
    model = load(torch.float64)
    last = torch.tensor([DOCUMENTS[3]["input_ids"]])
    row, places = ROW[:, : TOTAL - LENGTHS[-1]], PLACES[:, : TOTAL - LENGTHS[-1]]
    packed, alone = model(row, position_ids=places, use_cache=True), model(last, use_cache=True)
    for step in range(4):
        token, place = ROW[:, step : step + 1], torch.tensor([[LENGTHS[3] + step]])
        packed = model(token, position_ids=place, past_key_values=packed.past_key_values, use_cache=True)
        alone = model(token, past_key_values=alone.past_key_values, use_cache=True)
        assert float((packed.logits - alone.logits).abs().max()) < 1e-8


@pytest.mark.parametrize(("prefix", "longest"), [(3, 16), (8, 16), (30, 16)])
@torch.inference_mode()
def test_prefixes_of_packed_documents(load_family: Load, prefix: int, longest: int) -> None:
    """JRT's prefix is counted from the start of each document, whether it is shorter or longer than that."""
    model = load_family("jrt", torch.float64)
    want = torch.cat([model(torch.tensor([d["input_ids"]]), prefix_length=prefix).logits for d in DOCUMENTS], 1)
    got = model(ROW, position_ids=PLACES, prefix_length=prefix).logits
    assert float((got - want).abs().max()) < 1e-8
    assert float((want - one_by_one(model)).abs().max()) > 1e-3 or prefix == 8
