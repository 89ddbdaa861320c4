"""Released Based, JRT, Attention and Mamba layouts -> our checkpoint -> exported folder, against the official code's numbers.

The fixtures were made by running the official model files (see README.md beside this file, whose tolerances are used
for fp32). In fp64 all must agree to 1e-8. Cases that the originals give in fp32 only are held to those tolerances, and also
to our own full pass in fp64. Our convolution states keep one input less than the official ones, our Taylor states are packed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron.export.hf import export_checkpoint
from megatron.generation.load import load_model
from megatron.generation.sample import Sampling, generate
from megatron.interop.import_hf import import_folder
from megatron.interop.released import read_released
from megatron.model.config import ModelConfig
from megatron.model.loss import token_loss
from megatron.model.objectives import Objective, objective_loss
from megatron.ops.taylor.features import unpacked_features
from tests.export.modules_cache import use_private_modules_cache
from tests.golden.recorded import recorded
from tests.golden.store import largest, load_numbers, model_folder, model_names, near

NAMES = model_names("based", "jrt", "attn", "mamba")
FP64, HIDDEN, STATE, GRAD = 1e-8, 1e-3, 1e-5, 1e-4
JRT_MIXED = Objective("jrt", prefix_length=24)


@dataclass
class Fixture:
    """One golden model: the folder exported from its imported checkpoint, and the official inputs and outputs."""

    name: str
    source: Path
    checkpoint: Path
    exported: Path
    config: ModelConfig
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]

    def model(self, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.exported, trust_remote_code=True, dtype=dtype).eval()

    @property
    def logits_limit(self) -> float:
        return 1e-3 if self.name == "mamba_a" else 3e-4

    def limit(self, dtype: torch.dtype) -> float:
        return FP64 if dtype == torch.float64 else self.logits_limit


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    use_private_modules_cache()
    place = tmp_path_factory.mktemp(request.param)
    source = model_folder(request.param, place)
    imported = import_folder(source, place / "checkpoints")
    export_checkpoint(imported.checkpoint, place / "hf")
    files = [load_numbers(source / f"{part}.safetensors") for part in ("inputs", "outputs", "grads")]
    return Fixture(request.param, source, imported.checkpoint, place / "hf", imported.config, *files)


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def check_states(fixture: Fixture, case: str, cache: Any) -> None:
    """Every state that the originals stored (in fp32) for this case."""
    wanted = {name.removeprefix(f"{case}.layer"): t for name, t in fixture.outputs.items() if name.startswith(f"{case}.layer")}
    state_limit = STATE * largest([t for t in fixture.outputs.values() if t.is_floating_point()])
    for name, want in wanted.items():
        number, _, part = name.partition(".")
        state = cache.states[int(number)]
        if part == "conv":
            near(state["conv"].transpose(1, 2), want[..., 1:], HIDDEN)
        elif part == "ssm":
            near(state["ssm"], want, state_limit)
        elif part in ("k_state", "kv_state"):
            mixer = fixture.config.layer_types[int(number)]
            full = unpacked_features(state["recurrent"].transpose(-1, -2), fixture.config.layer_options[mixer]["feature_width"])
            full = full[:, :, -1:, None].transpose(2, 3) if part == "k_state" else full[:, :, None, :-1]
            near(full, want, state_limit)
        else:
            assert part == "kv_cache"
            held = min(want.shape[1], state["keys"].shape[1])
            for at, kind in enumerate(("keys", "values")):
                near(state[kind][:, state[kind].shape[1] - held :], want[:, want.shape[1] - held :, at], HIDDEN)


@torch.inference_mode()
def test_plain(golden: Fixture, dtype: torch.dtype) -> None:
    model, want = golden.model(dtype), golden.outputs
    with recorded(model) as seen:
        logits = model(golden.inputs["plain.input_ids"], use_cache=False).logits
    near(logits, want["plain.logits_fp64"], golden.limit(dtype))
    for part, value in seen.items():
        near(value, want[f"plain.{part}"], HIDDEN)


@pytest.mark.parametrize("case", ["decode", "short"])
@torch.inference_mode()
def test_prefill_and_steps(golden: Fixture, dtype: torch.dtype, case: str) -> None:
    model, tokens = golden.model(dtype), golden.inputs[f"{case}.input_ids"]
    prompt = int(golden.inputs[f"{case}.prefill_len"])
    first = model(tokens[:, :prompt], use_cache=True)
    rows, cache = [first.logits], first.past_key_values
    if f"{case}.logits" in golden.outputs:
        check_states(golden, f"{case}.prefill", cache)
    for i in range(prompt, tokens.shape[1]):
        rows.append(model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits)
    logits = torch.cat(rows, 1)
    prefix = {} if "prefix_length" not in model.model.input_names() else {"prefix_length": min(prompt, 24)}
    whole = model(tokens, use_cache=False, **prefix).logits
    near(logits, whole, golden.limit(dtype))
    if f"{case}.logits_fp64" in golden.outputs:
        near(logits, golden.outputs[f"{case}.logits_fp64"], golden.limit(dtype))
    if f"{case}.logits" in golden.outputs:  # the decaying model's original decodes wrongly: its prefill alone is given
        want = golden.outputs[f"{case}.logits"]
        near(logits[:, : want.shape[1]], want, golden.logits_limit)
        if want.shape[1] == tokens.shape[1]:
            check_states(golden, f"{case}.final", cache)


def test_generate(golden: Fixture) -> None:
    tokens = golden.inputs["generate.input_ids"]
    out = golden.model(torch.float32).generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=16,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, golden.outputs["generate.sequences"])
    near(torch.stack(out.logits, 1), golden.outputs["generate.step_logits"], golden.logits_limit)


def test_own_generation(golden: Fixture) -> None:
    model, _ = load_model(golden.checkpoint)
    tokens = golden.inputs["generate.input_ids"]
    made = generate(model, tokens.tolist(), Sampling(maximum_tokens=16), eod=10**6)
    for row, result in zip(golden.outputs["generate.sequences"], made, strict=True):
        assert result.tokens == row[tokens.shape[1] :].tolist()


@torch.inference_mode()
def test_cache_is_of_constant_size(golden: Fixture) -> None:
    """Everything but full attention: the state after 60 tokens is as large as after 20."""
    model = golden.model(torch.float32)
    tokens = torch.randint(0, golden.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0))
    sizes = []
    for length in (20, 60):
        states = model(tokens[:, :length], use_cache=True).past_key_values.states
        sizes.append(sum(t.numel() for state in states for t in state.values()))
    assert (sizes[0] == sizes[1]) == ("global" not in golden.config.layer_types)


def golden_settings(golden: Fixture) -> dict[str, Any]:
    return json.loads((golden.source / "config.json").read_text())


def official_shapes(golden: Fixture) -> dict[str, Tensor]:
    """Every official parameter as numbers of its own, so that it can be told where its parts went."""
    raw = torch.load(golden.source / "pytorch_model.bin", weights_only=True)
    clean = {n.removeprefix("model.").replace("conv1.conv", "conv.conv"): t for n, t in raw.items() if "metrics" not in n}
    return {n: t for n, t in clean.items() if n not in ("lm_head.weight", "transformer.decay.decay")}


@pytest.mark.parametrize("through", ["exported", "trainer"])
def test_gradients(golden: Fixture, dtype: torch.dtype, through: str) -> None:
    """Norms of all gradients and small gradients in full; an official parameter that is two or three of ours is joined."""
    jrt = golden.name == "jrt_a"
    tokens = golden.inputs["loss.x" if jrt else "plain.input_ids"]
    if through == "exported":
        model = golden.model(dtype).train()
        logits = model(tokens).logits
    else:
        model = load_model(golden.checkpoint, dtype=dtype)[0].train()
        logits, _ = model(tokens)
    loss = token_loss(logits[:, :-1], tokens[:, 1:])
    if jrt:
        loss, _ = objective_loss(JRT_MIXED, logits, *masked_labels(golden.inputs["loss.y"]), token_loss)
    loss.backward()
    near(loss.reshape(1), golden.grads["loss"], golden.limit(dtype))
    limit = FP64 if dtype == torch.float64 else GRAD
    ours = {name: p.grad.double() for name, p in model.named_parameters()}
    official = official_shapes(golden)
    norms = {n.removeprefix("norm/"): t for n, t in golden.grads.items() if n.startswith("norm/")}
    assert set(norms) == set(official)
    used = set()
    for name, want in norms.items():
        marked = {n: torch.full_like(t, float(n == name)) for n, t in official.items()}
        parts = [n for n, t in read_released(golden_settings(golden), marked)[1].items() if bool((t == 1).any())]
        used |= set(parts)
        got = torch.stack([ours[n].norm() for n in parts]).norm()
        assert float((got - want).abs()) <= limit * float(want), name
        if f"full/{name}" in golden.grads:
            full = golden.grads[f"full/{name}"].double()
            joined = torch.cat([ours[n] for n in parts]) if len(parts) > 1 else ours[parts[0]]
            assert float((joined - full).norm()) <= max(limit, 1e-6) * float(full.norm()), name  # stored in fp32
    assert used == set(ours)


def masked_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and what counts of them: in the prefix the originals skip a hidden token of id 0 (their test is label > 0)."""
    counts = labels != -100
    counts[:, :24] &= labels[:, :24] > 0
    return labels, counts.float()


ONLY_JRT = pytest.mark.parametrize("golden", ["jrt_a"], indirect=True)


@ONLY_JRT
@torch.inference_mode()
def test_jrt_filler_mask(golden: Fixture, dtype: torch.dtype) -> None:
    model, inputs, want = golden.model(dtype), golden.inputs, golden.outputs
    with recorded(model) as seen:
        out = model(inputs["masked.input_ids"], prefix_mask=inputs["masked.mask"], use_cache=True)
    near(out.logits, want["masked.logits_fp64"], golden.limit(dtype))
    for part, value in seen.items():
        if f"masked.{part}" in want:
            near(value, want[f"masked.{part}"], HIDDEN)
    tokens, prompt = inputs["masked_decode.input_ids"], int(inputs["masked_decode.prefill_len"])
    first = model(tokens[:, :prompt], prefix_mask=inputs["masked.mask"], use_cache=True)
    rows, cache = [first.logits], first.past_key_values
    check_states(golden, "masked_decode.prefill", cache)
    for i in range(prompt, tokens.shape[1]):
        step = model(tokens[:, i : i + 1], prefix_mask=inputs["masked.mask"], past_key_values=cache, use_cache=True)
        rows.append(step.logits)
    near(torch.cat(rows, 1), want["masked_decode.logits_fp64"], golden.limit(dtype))
    check_states(golden, "masked_decode.final", cache)


@ONLY_JRT
def test_jrt_left_padded_decoding(golden: Fixture) -> None:
    """`default_left_pad`: filler up to the prefix's length, its keys hidden."""
    tokens, want = golden.inputs["generate.input_ids"], golden.outputs["generate_left_pad.sequences"]
    start = int(golden.outputs["generate_left_pad.start"])
    model, _ = load_model(golden.checkpoint)
    sampling = Sampling(maximum_tokens=want.shape[1] - start, prompt_mode="left_pad", prefix_length=24, return_logits=True)
    for row, result in zip(want, generate(model, tokens.tolist(), sampling, eod=10**6), strict=True):
        assert result.tokens == row[start:].tolist()
    filled, mask = want[:, :start], torch.zeros(len(want), start)
    mask[:, start - tokens.shape[1] :] = 1
    out = golden.model(torch.float32).generate(
        filled,
        attention_mask=torch.ones_like(filled),
        prefix_mask=mask,
        max_new_tokens=want.shape[1] - start,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, want)
    near(torch.stack(out.logits, 1), golden.outputs["generate_left_pad.step_logits"], golden.logits_limit)


@ONLY_JRT
@torch.inference_mode()
def test_jrt_losses(golden: Fixture, dtype: torch.dtype) -> None:
    model, inputs, want = golden.model(dtype), golden.inputs, golden.outputs
    limit = golden.limit(dtype)
    mixed, parts = objective_loss(JRT_MIXED, model(inputs["loss.x"]).logits, *masked_labels(inputs["loss.y"]), token_loss)
    near(mixed, want["loss.mixed_fp64"], limit)
    near(parts["ntp_loss"], want["loss.mixed_ntp_fp64"], limit)
    near(parts["mlm_loss"] * 0.25, want["loss.mixed_mlm_weighted_fp64"], limit)
    logits, labels = model(inputs["loss.x_plain"]).logits, inputs["loss.y_plain"]
    for name, objective in (("continual", Objective("prefix", prefix_length=24)), ("default", Objective())):
        near(objective_loss(objective, logits, labels, None, token_loss)[0], want[f"loss.{name}_fp64"], limit)
