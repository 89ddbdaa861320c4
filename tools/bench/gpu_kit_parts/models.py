"""Whole models for the GPU kit: training steps and token steps with any mixer, on any path."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import EngineSettings
from megatron.engine.build import build_engine
from megatron.engine.single_process import SingleProcessEngine
from megatron.generation.decode import TokenStep
from megatron.model import init
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.stages import BlockStage, NormStage
from megatron.parallel.mesh import Mesh
from megatron.parallel.shard_spec import slice_of
from tools.bench.gpu_kit_parts.part import Part

MIXERS = ("metala", "based", "base_conv", "sliding", "global", "alibi", "mamba")
# width, layers, heads, MLP width, as in the shipped configs
SIZES = {"380M": (1024, 24, 8, 2816), "1.3B": (2048, 24, 16, 5632)}
WORDS = 50304
# Based's own order: two kinds in turn, see configs/based-1b.yml
_BASED = ("base_conv", "based", "base_conv", "sliding")


def backend_of(part: Part, mixer: str) -> str:
    """The fused path where there is one; in a rehearsal Flex has no backward on a CPU."""
    return "auto" if not part.rehearse else "torch" if mixer == "alibi" else "triton"


def model_config(mixer: str, size: str, rehearse: bool) -> ModelConfig:
    """A model of this size with one mixer, or with `hybrid` the blocks of Based in turn."""
    d, layers, heads, mlp = (32, 4, 2, 64) if rehearse else SIZES[size]
    kinds = _BASED if mixer == "hybrid" else (mixer,)
    mixers = tuple(kinds[i % len(kinds)] for i in range(layers))
    heads = heads if mixer == "metala" else d // (16 if rehearse else 64)
    return ModelConfig(128 if rehearse else WORDS, d, layers, heads, mlp, mixers)


@contextlib.contextmanager
def quick_init(device: str) -> Iterator[None]:
    """Matrices are drawn on the device meanwhile: the project draws them on the CPU, 10 s for 1.3B, the same on every mesh."""
    exact = init.initial_value

    def quick(spec: Any, config: ModelConfig, seed: int) -> torch.Tensor:
        if len(spec.shape) != 2:
            return exact(spec, config, seed)
        return torch.empty(spec.shape, device=device).normal_(std=config.init_std)

    init.initial_value = quick
    try:
        yield
    finally:
        init.initial_value = exact


class Trainee:
    """A model with its optimizer (weights bf16, masters and Adam fp32) that takes steps of random tokens."""

    def __init__(self, device: str, config: ModelConfig, length: int) -> None:
        self.device, self.words, self.length = device, config.vocab_size, length
        chunk, dtype = (8, "fp32") if device == "cpu" else (4096, "bf16")
        settings = EngineSettings(dtype=dtype, seq_length=length, loss_chunk_tokens=chunk)
        with quick_init(device):
            engine = build_engine("single", config, Mesh.single(), settings)
        assert isinstance(engine, SingleProcessEngine)
        self.engine = engine

    def use(self, backend: str) -> None:
        """Run the blocks and the final norm on this path from now on."""
        for module in self.engine.stages:
            if isinstance(module, (BlockStage, NormStage)):
                module.backend = backend

    def batch(self, micro_batch: int) -> MicroBatch:
        """Random tokens, each one a target."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, self.words, (micro_batch, self.length + 1), generator=generator)
        return MicroBatch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), torch.ones(micro_batch, self.length))

    def step(self, micro_batch: int) -> float:
        """One optimizer step; its loss."""
        return float(self.engine.train_step([self.batch(micro_batch)], 1e-4).loss)

    def matmul_flops_per_token(self) -> int:
        """6 x the weights that a token is multiplied with, forward and backward: the LM head counts, the embedding does not."""
        return 6 * sum(p.numel() for p in self.engine.parameters().values() if p.dim() == 2)


def filled(config: ModelConfig, device: str, dtype: torch.dtype) -> Any:
    """A model with initial values and packed projections, ready to decode."""
    with torch.device("meta"):
        model = build_model(config)
    specs = param_specs(config)
    with quick_init(device):
        init.init_weights(
            model, {n: n for n in specs}, specs, config, 1,
            slices=lambda spec: slice_of(spec.shape, spec.cut, 0, 1), device=device, dtype=dtype,
        )  # fmt: skip
    for block in model.model.blocks():
        block.pack_weights()
    return model.eval()


def decoding(part: Part, config: ModelConfig, batch: int, steps: int = 0) -> dict[str, Any]:
    """Milliseconds of a token step of `batch` texts; `steps`: run so many only to see whether they are finite and recorded."""
    model = filled(config, part.device, part.dtype)
    tokens = torch.zeros(batch, dtype=torch.long, device=part.device)
    with torch.inference_mode():
        step = TokenStep(model, model.init_state(batch), backend_of(part, config.layer_types[0]))
        for _ in range(max(steps, 3)):
            logits = step(tokens)
        fields = {"graph": step.graph is not None, "decode_finite": bool(torch.isfinite(logits).all())}
        return fields if steps else fields | {"ms": part.ms(lambda: step(tokens))}
