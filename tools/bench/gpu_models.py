"""One MetaLA layer and whole models for `metala_gpu.py`: training steps, token steps and memory, with our operator or a peer's.

The peers run inside the same layers and engine: only the operator between projections and output product differs (the short
convolution, the norms and the loss are ours in all of them), so that the difference is the operator's.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import EngineSettings
from megatron.engine.build import build_engine
from megatron.engine.single_process import SingleProcessEngine
from megatron.generation.decode import TokenStep
from megatron.layers.base import Context
from megatron.layers.metala import MetaLA
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import init_weights
from megatron.model.stages import BlockStage, NormStage
from megatron.ops import dispatch
from megatron.parallel.mesh import Mesh
from megatron.parallel.shard_spec import slice_of
from tools.bench.gpu_peers import fla_version, use_fla_in_layers
from tools.bench.gpu_timing import Clock


def backends(device: str) -> dict[str, str | bool]:
    """Name -> our backend's, or for a peer whether its glue is compiled."""
    if device == "cpu":
        return {"ours": "triton", "torch": "torch"}
    peers: dict[str, str | bool] = {"fla + eager glue": False, "fla + compiled glue": True} if fla_version() else {}
    return {"ours": "triton", **peers}


@contextlib.contextmanager
def running(which: str | bool) -> Iterator[str]:
    """The `kernel_backend` that runs it; a peer takes the place of our adapter meanwhile."""
    if isinstance(which, str):
        yield which
        return
    paths = dispatch._paths["metala"]
    before = paths.get("fla")
    paths["fla"] = use_fla_in_layers(which)
    try:
        yield "fla"
    finally:
        del paths["fla"]
        if before is not None:
            paths["fla"] = before


def layer_rows(device: str, dtype: torch.dtype, clock: Clock, cases: list[tuple[int, int, int, int]]) -> list[dict[str, Any]]:
    """Forward and backward ms of a complete mixer at (d, heads, batch, length)."""
    rows = []
    for d, heads, b, t in cases:
        layer = MetaLA(MetaLA.Config(hidden_size=d, num_heads=heads)).to(device, dtype)
        layer.pack_weights()
        x = torch.randn(b, t, d, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
        row: dict[str, Any] = {"d": d, "heads": heads, "batch": b, "length": t}
        for name, which in backends(device).items():
            with running(which) as backend:
                ctx = Context(backend=backend)
                with torch.no_grad():
                    forward = clock(lambda: layer(x, ctx))  # noqa: B023
                both = clock(lambda: layer(x, ctx)[0].sum().backward())  # noqa: B023
            row[name] = {"forward_ms": forward, "forward_and_backward_ms": both}
        rows.append(row)
    return rows


class Trainee:
    """A model with its optimizer (weights bf16, masters and Adam fp32), built once and run with every operator."""

    def __init__(self, device: str, config: ModelConfig, length: int) -> None:
        self.on_gpu, self.device, self.vocab, self.length = device != "cpu", device, config.vocab_size, length
        chunk, dtype = (4096, "bf16") if self.on_gpu else (8, "fp32")
        settings = EngineSettings(dtype=dtype, seq_length=length, loss_chunk_tokens=chunk)
        engine = build_engine("single", config, Mesh.single(), settings)
        assert isinstance(engine, SingleProcessEngine)
        self.engine = engine

    def use(self, backend: str) -> None:
        """Run the blocks and the final norm on this path from now on."""
        for module in self.engine.stages:
            if isinstance(module, (BlockStage, NormStage)):
                module.backend = backend

    def forget(self) -> None:
        """Drop what a step that ran out of memory has left."""
        for tensor in (*self.engine.parameters().values(), *self.engine._masters.values()):
            tensor.grad = None
        torch.cuda.empty_cache()

    def measure(self, micro_batch: int) -> dict[str, float]:
        """Tokens per second and peak GiB of optimizer steps of one micro batch."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        x = torch.randint(0, self.vocab, (micro_batch, self.length + 1), generator=torch.Generator().manual_seed(0))
        batch = MicroBatch(x[:, :-1].contiguous(), x[:, 1:].contiguous(), torch.ones(micro_batch, self.length))
        ms = Clock(self.device, 2.0 if self.on_gpu else 0.0, 8)(lambda: self.engine.train_step([batch], 1e-4))
        result = {"micro_batch": micro_batch, "tokens_per_s": micro_batch * self.length / ms * 1e3}
        return result | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if self.on_gpu else {})

    def largest_that_fits(self, sizes: tuple[int, ...]) -> dict[str, Any]:
        """The first of these micro batches that does not run out of memory."""
        for size in sizes:
            try:
                return self.measure(size)
            except torch.OutOfMemoryError:
                pass  # what it held is freed only after the exception is gone
            self.forget()
        return {"error": f"out of memory at micro batch {sizes[-1]}"}


def filled(config: ModelConfig, device: str, dtype: torch.dtype) -> Any:
    """A model with initial values, projections laid together, ready to decode."""
    with torch.device("meta"):
        model = build_model(config)
    specs = param_specs(config)
    init_weights(
        model, {n: n for n in specs}, specs, config, 1,
        slices=lambda spec: slice_of(spec.shape, spec.cut, 0, 1), device=device, dtype=dtype,
    )  # fmt: skip
    for block in model.model.blocks():
        block.pack_weights()
    return model.eval()


def decoding(device: str, config: ModelConfig, backend: str, batch: int) -> dict[str, float]:
    """Milliseconds of a token step of `batch` texts, recorded as a graph on a GPU, and without one."""
    model = filled(config, device, torch.bfloat16 if device != "cpu" else torch.float32)
    tokens = torch.zeros(batch, dtype=torch.long, device=device)
    clock, timings = Clock(device, 0.5 if device != "cpu" else 0.0), {}
    with torch.inference_mode():
        for name, record in (("graph_ms", device != "cpu"), ("no_graph_ms", False)):
            step = TokenStep(model, model.init_state(batch), backend, record)
            timings[name] = clock(lambda: step(tokens))  # noqa: B023
    return timings


def peer_decoding(config: ModelConfig, batch: int) -> dict[str, Any]:
    """Milliseconds of a token step of flash-linear-attention's GLA model of the same widths, as its library runs it."""
    try:
        fla = importlib.import_module("fla.models")
        shape = fla.GLAConfig(
            hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_heads=config.num_heads, expand_k=0.5,
            expand_v=1.0, intermediate_size=config.mlp_width, vocab_size=config.vocab_size, use_short_conv=True,
        )  # fmt: skip
        model = fla.GLAForCausalLM(shape).to("cuda", torch.bfloat16).eval()
        tokens = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        with torch.inference_mode():
            cache = model(tokens, use_cache=True).past_key_values
            return {"ms": Clock("cuda", 0.5)(lambda: model(tokens, past_key_values=cache, use_cache=True))}
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


def model_rows(
    device: str,
    models: Mapping[str, tuple[int, int, int, int]],
    length: int,
    micro_batches: tuple[int, ...],
    decode_batch: int,
    vocab: int,
) -> list[dict[str, Any]]:
    """Training and token steps of whole models (width, layers, heads, MLP width) with each operator."""
    rows = []
    for name, (d, layers, heads, mlp) in models.items():
        config = ModelConfig(vocab, d, layers, heads, mlp, ("metala",) * layers)
        row: dict[str, Any] = {"model": name, "length": length}
        trainee = Trainee(device, config, length)
        for variant, which in backends(device).items():
            with running(which) as backend:
                trainee.use(backend)
                row[variant] = trainee.largest_that_fits(micro_batches)
        trainee.forget()
        del trainee
        row["token step"] = {"batch": decode_batch, "ours": decoding(device, config, "triton", decode_batch)}
        if device != "cpu" and fla_version():
            row["token step"]["fla GLA"] = peer_decoding(config, decode_batch)
        rows.append(row)
    return rows
