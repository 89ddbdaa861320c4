"""Quantised weights on every family: bitsandbytes, torchao and torch's own; the quantised modules act everywhere.

What the wrapper of a weight computes is the other library's affair; here a pass must be what its modules say: near the
full-precision logits, and the same in one pass, in steps through the cache and in a padded batch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.export.families import BATCH, MASK, TOKENS

Load = Callable[..., Any]


NARROW = ["x_proj", "dt_proj", "lm_head"]
"""Left as they are: Mamba's low-rank projections fill no block of those in which bitsandbytes packs 4 bits on some CPUs."""


@pytest.fixture
def folder(family: str, exported: Callable[[str], Path]) -> Path:
    return exported(f"{family}_wide")


@pytest.fixture
def load(family: str, load_family: Load) -> Load:
    return functools.partial(load_family, f"{family}_wide")


def linears(model: Any, skipped: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Projections of mixers and MLPs but the last: transformers keeps the module of a model's last parameter as it is."""
    last = list(model.named_parameters())[-1][0] if any(True for _ in model.parameters()) else ""
    named = {n: m for n, m in model.named_modules() if not n.endswith(tuple(skipped))}
    found = {n: m for n, m in named.items() if n.endswith(("proj", "k_gate", "l1", "l2", "l3"))}
    return {name: module for name, module in found.items() if not last.startswith(name)}


def close(a: Tensor, b: Tensor) -> float:
    """1 - the cosine of two sets of logits."""
    return 1 - float(torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


@torch.inference_mode()
def check(model: Any, plain: Any, same: float = 1e-5) -> None:
    """Logits near the plain model's, in one pass, in steps and in a padded batch `same`, and texts."""
    want, got = plain(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits
    assert 1e-7 < close(got, want) < 0.15
    cache, parts = None, []
    for start, stop in ((0, 8), *((i, i + 1) for i in range(8, 12))):
        out = model(TOKENS[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert close(torch.cat(parts, 1), got) < same
    assert close(model(BATCH, attention_mask=MASK).logits[1, 3:], model(BATCH[1:, 3:]).logits[0]) < same
    options = {"attention_mask": MASK, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(BATCH, **options).shape == (2, 15)


def test_quantize_dynamic(load: Load) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(load(), {nn.Linear}, dtype=torch.qint8)
    assert all(isinstance(m, torch.ao.nn.quantized.dynamic.Linear) for m in linears(model).values())
    check(model, load(), same=0.05)  # one scale for all activations of a call


def by_bitsandbytes(folder: Path, bits: int) -> Any:
    how: dict[str, Any] = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        device_map="cpu",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**how, llm_int8_skip_modules=NARROW),
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(load: Load, folder: Path, bits: int, tmp_path: Path) -> None:
    """Its backend for CPUs; loaded from the folder, and saved and loaded again."""
    bnb = pytest.importorskip("bitsandbytes")
    model, kind = by_bitsandbytes(folder, bits), bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    assert all(isinstance(module, kind) for module in linears(model, NARROW).values())
    check(model, load(), same=0.01)  # computed in half precision, outliers apart
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantised", trust_remote_code=True, device_map="cpu")
    assert all(isinstance(module, kind) for module in linears(again, NARROW).values())
    assert close(again(TOKENS).logits, model(TOKENS).logits) < 0.01


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_on_quantised_weights(folder: Path, bits: int) -> None:
    """QLoRA: every tensor of the adapters gets a gradient."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(by_bitsandbytes(folder, bits))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


@pytest.mark.parametrize("bits", [4, 8])
def test_torchao(load: Load, folder: Path, bits: int) -> None:
    """Weights only: tensors of a class of their own inside `nn.Linear`."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis

    how = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)) if bits == 4 else Int8WeightOnlyConfig()
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, quantization_config=TorchAoConfig(how)
    ).eval()
    assert all(type(module.weight.data) is not torch.Tensor for module in linears(model).values())
    check(model, load())
