"""The token step on buffers that stay in place: the logits of plain steps, for fixed and growing states; recorded on a GPU.

fp32 on one device: 2e-5 on logits of order 1 (another order of sums in the packed projection and in the kernels).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.generation.decode import TokenStep
from megatron.generation.sample import Sampling, generate
from megatron.layers.base import Context
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import init_weights
from megatron.parallel.shard_spec import slice_of
from tests.ops.fused_cases import NO_GPU

MIXES = {
    "metala": ("metala", "metala"),
    "based": ("base_conv", "based"),
    "jrt": ("jrt",),
    "mamba": ("mamba",),
    "growing": ("metala", "global"),
}
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="no CUDA device")]


def model_of(layers: tuple[str, ...], device: str = "cpu") -> Any:
    config = ModelConfig(32, 64, len(layers), 2, 48, layers)
    with torch.device("meta"):
        model = build_model(config)
    specs = param_specs(config)
    init_weights(
        model, {n: n for n in specs}, specs, config, 3,
        slices=lambda spec: slice_of(spec.shape, spec.cut, 0, 1), device=device, dtype=torch.float32,
    )  # fmt: skip
    return model.eval()


def both(model: Any, backend: str, device: str, steps: int = 5) -> tuple[Tensor, Tensor, TokenStep]:
    """Logits [steps, b, n] of plain steps and of `TokenStep` after the same prompt."""
    g = torch.Generator().manual_seed(0)
    prompt, tokens = (torch.randint(0, 32, shape, generator=g).to(device) for shape in ((3, 7), (steps, 3)))
    with torch.inference_mode():
        _, state = model(prompt, Context(backend="torch"), model.init_state(3))
        kept = [{name: t.clone() for name, t in part.items()} for part in state]
        step = TokenStep(model, state, backend)
        fast = torch.stack([step(t) for t in tokens])
        plain, current = [], state
        for t in tokens:
            logits, current = model.step(t, current, Context(backend="torch"))
            plain.append(logits)
    for part, old in zip(state, kept, strict=True):
        assert all(torch.equal(part[name], old[name]) for name in part), "the prompt's state must stay as it was"
    return torch.stack(plain), fast, step


@pytest.mark.parametrize("mix", sorted(MIXES))
def test_same_logits_as_plain_steps(mix: str) -> None:
    plain, fast, step = both(model_of(MIXES[mix]), "torch", "cpu")
    assert (plain - fast).abs().max() < 2e-5
    assert step.fixed == (mix != "growing") and step.graph is None


@pytest.mark.parametrize("layers", [("metala", "metala"), ("base_conv", "based"), ("base_conv", "mamba"), ("jrt",)])
def test_fused_steps_write_the_buffers_in_place(layers: tuple[str, ...]) -> None:
    pytest.importorskip("triton", reason="the fused kernels need Triton")
    plain, fast, step = both(model_of(layers), "triton", "cpu", 3)
    assert (plain - fast).abs().max() < 2e-5
    places = [t.data_ptr() for part in step.state for t in part.values()]
    with torch.inference_mode():
        step(torch.zeros(3, dtype=torch.long))
    assert [t.data_ptr() for part in step.state for t in part.values()] == places


def full_and_cached(model: Any, device: str) -> tuple[Tensor, Tensor]:
    """Logits [3, 12, n] of one pass by torch, and of a prefill of seven tokens and five steps by the fused kernels."""
    tokens = torch.randint(0, 32, (3, 12), generator=torch.Generator().manual_seed(0)).to(device)
    fused = Context(backend="triton")
    with torch.inference_mode():
        full, _ = model(tokens, Context(backend="torch"))
        first, state = model(tokens[:, :7], fused, model.init_state(3))
        rest = []
        for t in tokens[:, 7:].unbind(1):
            logits, state = model.step(t, state, fused)
            rest.append(logits)
    return full, torch.cat([first, torch.stack(rest, 1)], 1)


@pytest.mark.parametrize(
    ("device", "limit"), [pytest.param("cpu", 2e-5, id="interpreted"), pytest.param("cuda", 1e-3, marks=needs_gpu, id="gpu")]
)
@pytest.mark.parametrize("mix", ["metala", "based", "jrt", "mamba"])
def test_fused_prefill_and_steps_are_the_full_pass(mix: str, device: str, limit: float) -> None:
    pytest.importorskip("triton", reason="the fused kernels need Triton")
    full, cached = full_and_cached(model_of(MIXES[mix], device), device)
    assert (full - cached).abs().max() < limit


@pytest.mark.parametrize("mix", [pytest.param(m, marks=needs_gpu) for m in sorted(MIXES)])
def test_recorded_on_a_gpu(mix: str) -> None:
    """From the third token on a replay; a model with growing states is never recorded. 1e-3: tf32 and fused kernels."""
    plain, fast, step = both(model_of(MIXES[mix], "cuda"), "auto", "cuda")
    assert (plain - fast).abs().max() < 1e-3
    assert (step.graph is not None) == (mix != "growing")


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="no CUDA device")
def test_generate_says_the_same_with_and_without_a_graph() -> None:
    model, prompts = model_of(MIXES["metala"], "cuda"), [[1, 2, 3], [4]]
    texts = [
        [r.tokens for r in generate(model, prompts, Sampling(maximum_tokens=12, cuda_graph=graph), eod=0)]
        for graph in (False, True)
    ]
    assert texts[0] == texts[1]
