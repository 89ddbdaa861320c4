"""Released MetaLA layout -> our checkpoint -> exported folder, and every number of the official code comes out of that folder.

The fixtures were made by running the official model files (see README.md beside this file, whose tolerances are used
for fp32). In fp64 all must agree to 1e-8. Our convolution state keeps the last three inputs, the official one the last four.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.checkpoint.find import find_checkpoint
from megatron.export.hf import export_checkpoint
from megatron.generation.load import load_model
from megatron.generation.sample import Sampling, generate
from megatron.interop.import_hf import import_folder
from megatron.model.loss import token_loss
from tests.export.modules_cache import use_private_modules_cache
from tests.golden.recorded import recorded
from tests.golden.store import largest, load_numbers, model_folder, model_names, near

NAMES = model_names("metala")
FP64 = 1e-8
LOGITS = {"metala_a": 1e-3, "metala_b": 3e-4, "metala_c": 3e-4}
HIDDEN, STATE, GRAD = 1e-3, 1e-5, 1e-4


@dataclass
class Fixture:
    """One golden model: the folder exported from its imported checkpoint, and the official inputs and outputs."""

    name: str
    checkpoint: Path
    exported: Path
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]

    def model(self, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.exported, trust_remote_code=True, dtype=dtype).eval()

    def limit(self, dtype: torch.dtype) -> float:
        return FP64 if dtype == torch.float64 else LOGITS[self.name]


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    use_private_modules_cache()
    place = tmp_path_factory.mktemp(request.param)
    source = model_folder(request.param, place)
    checkpoint = import_folder(source, place / "checkpoints").checkpoint
    assert find_checkpoint(place / "checkpoints") == checkpoint
    export_checkpoint(checkpoint, place / "hf")
    files = [load_numbers(source / f"{part}.safetensors") for part in ("inputs", "outputs", "grads")]
    return Fixture(request.param, checkpoint, place / "hf", *files)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def check_states(fixture: Fixture, case: str, cache: Any) -> None:
    """Recurrent state and convolution window against the official caches (stored in fp32)."""
    state_limit = STATE * largest([t for n, t in fixture.outputs.items() if ".state." in n])
    for i, state in enumerate(cache.states):
        near(state["recurrent"], fixture.outputs[f"{case}.state.{i}"], state_limit)
        near(state["conv"].transpose(1, 2), fixture.outputs[f"{case}.conv_cache.{i}"][..., 1:], HIDDEN)


@torch.inference_mode()
def test_plain(golden: Fixture, dtype: torch.dtype) -> None:
    model, want = golden.model(dtype), golden.outputs
    with recorded(model) as seen:
        out = model(golden.inputs["plain.input_ids"], labels=golden.inputs["plain.labels"], use_cache=True)
    near(out.logits, want["plain.logits_fp64"], golden.limit(dtype))
    near(out.loss, want["plain.loss_fp64"], golden.limit(dtype))
    for part, value in seen.items():
        near(value, want[f"plain.{part}"], HIDDEN)
    check_states(golden, "plain", out.past_key_values)


@torch.inference_mode()
def test_left_padding(golden: Fixture, dtype: torch.dtype) -> None:
    model, want = golden.model(dtype), golden.outputs
    with recorded(model) as seen:
        out = model(golden.inputs["leftpad.input_ids"], attention_mask=golden.inputs["leftpad.attention_mask"], use_cache=True)
    near(out.logits, want["leftpad.logits_fp64"], golden.limit(dtype))
    for part, value in seen.items():
        near(value, want[f"leftpad.{part}"], HIDDEN)
    check_states(golden, "leftpad", out.past_key_values)


@pytest.mark.parametrize("case", ["decode", "short"])
@torch.inference_mode()
def test_prefill_and_steps(golden: Fixture, dtype: torch.dtype, case: str) -> None:
    model, tokens = golden.model(dtype), golden.inputs[f"{case}.input_ids"]
    mask = golden.inputs.get(f"{case}.attention_mask", torch.ones_like(tokens))
    prompt = int(golden.inputs[f"{case}.prefill_len"])
    out = model(tokens[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True)
    check_states(golden, f"{case}.prefill", out.past_key_values)
    rows, cache = [out.logits[:, -1]], out.past_key_values
    for i in range(prompt, tokens.shape[1]):
        out = model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache, use_cache=True)
        rows.append(out.logits[:, -1])
    near(torch.stack(rows, 1), golden.outputs[f"{case}.logits_fp64"], golden.limit(dtype))
    check_states(golden, f"{case}.final", cache)


def test_generate(golden: Fixture) -> None:
    tokens, mask = golden.inputs["generate.input_ids"], golden.inputs["generate.attention_mask"]
    out = golden.model(torch.float32).generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=16,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, golden.outputs["generate.sequences"])
    near(torch.stack(out.logits, 1), golden.outputs["generate.step_logits"], LOGITS[golden.name])


def test_own_generation(golden: Fixture) -> None:
    """Our own sampler says what the official `generate` says, prompt by prompt."""
    model, _ = load_model(golden.checkpoint)
    tokens, mask = golden.inputs["generate.input_ids"], golden.inputs["generate.attention_mask"]
    prompts = [row[keep.bool()].tolist() for row, keep in zip(tokens, mask, strict=True)]
    made = generate(model, prompts, Sampling(maximum_tokens=16), eod=2)
    for row, result in zip(golden.outputs["generate.sequences"], made, strict=True):
        new = row[tokens.shape[1] :].tolist()
        assert result.tokens == (new[: new.index(2)] if 2 in new else new)
        assert result.finished == (2 in new)


@pytest.mark.parametrize("through", ["exported", "trainer"])
def test_gradients(golden: Fixture, dtype: torch.dtype, through: str) -> None:
    tokens, labels = golden.inputs["plain.input_ids"], golden.inputs["plain.labels"]
    if through == "exported":
        model = golden.model(dtype).train()
        loss = model(tokens, labels=labels).loss
    else:
        model = load_model(golden.checkpoint, dtype=dtype)[0].train()
        loss = token_loss(model(tokens)[0][:, :-1], labels[:, 1:])
    loss.backward()
    limit = FP64 if dtype == torch.float64 else GRAD
    near(loss.reshape(1), golden.grads["loss"], golden.limit(dtype))
    named = dict(model.named_parameters())
    norms = {n.removeprefix("norm/"): t for n, t in golden.grads.items() if n.startswith("norm/")}
    assert set(norms) == set(named)
    for name, want in norms.items():
        assert float((named[name].grad.double().norm() - want).abs()) <= limit * float(want), name
    for name, want in golden.grads.items():
        if name.startswith("full/"):
            got = named[name.removeprefix("full/")].grad.double()
            assert float((got - want.double()).norm()) <= limit * float(want.double().norm()), name
