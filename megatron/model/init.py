"""Initial values by role, the same on every mesh.

Each parameter is drawn in full on the CPU from a generator seeded by (run seed, its logical name) and then sliced: a model
starts from the same numbers on 1 or 64 processes (GPT-NeoX's GPU path depends on the mesh).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from megatron.model.config import ModelConfig
from megatron.parallel.shard_spec import ParamSpec, Slice

METHODS = (
    "normal",
    "scaled_normal",
    "single_residual_scaled_normal",
    "small_init",
    "wang_init",
    "xavier_uniform",
    "xavier_normal",
    "orthogonal",
    "scaled_orthogonal",
)


def _sigma(method: str, config: ModelConfig) -> float:
    """Standard deviation of the methods that draw from a normal distribution (spec of GPT-NeoX)."""
    d, layers, std = config.hidden_size, config.num_layers, config.init_std
    return {
        "normal": std,
        "scaled_normal": std / math.sqrt(2 * layers),
        "single_residual_scaled_normal": std / math.sqrt(layers),
        "small_init": math.sqrt(2 / (5 * d)),
        "wang_init": 2 / layers / math.sqrt(d),
    }[method]


def _draw(method: str, value: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    if method == "xavier_uniform":
        nn.init.xavier_uniform_(value, generator=generator)
    elif method == "xavier_normal":
        nn.init.xavier_normal_(value, generator=generator)
    elif method in ("orthogonal", "scaled_orthogonal"):
        gain = 1.0 if method == "orthogonal" else math.sqrt(2 / config.num_layers)
        nn.init.orthogonal_(value, gain=gain, generator=generator)
    else:
        value.normal_(0.0, _sigma(method, config), generator=generator)


def _log_range(value: Tensor, _: ModelConfig, __: torch.Generator) -> None:
    """Mamba's A = -(1, 2, .. n) in every channel, stored as its logarithm (S4D-real)."""
    value.copy_(torch.arange(1, value.shape[-1] + 1, dtype=value.dtype).log().expand_as(value))


def _step_size(value: Tensor, _: ModelConfig, generator: torch.Generator) -> None:
    """Mamba's bias of the step sizes: softplus of it is log-uniform in [0.001, 0.1], at least 0.0001."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = value.uniform_(low, high, generator=generator).exp().clamp(min=1e-4)
    value.copy_(dt + torch.log(-torch.expm1(-dt)))


def _uniform_input(value: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Mamba's input projections: PyTorch's uniform rule; with `mixer_init: methods` the model's `init_method`."""
    bound = 1 / math.sqrt(value.shape[-1])
    if config.mixer_init == "methods":
        _draw(config.init_method, value, config, generator)
    else:
        value.uniform_(-bound, bound, generator=generator)


def _uniform_output(value: Tensor, config: ModelConfig, generator: torch.Generator) -> None:
    """Mamba's output projection: the uniform rule divided by sqrt(num_layers); or `output_init_method`, as above."""
    bound = 1 / math.sqrt(value.shape[-1] * config.num_layers)
    if config.mixer_init == "methods":
        _draw(config.output_init_method, value, config, generator)
    else:
        value.uniform_(-bound, bound, generator=generator)


_RECURRENT: dict[str, Callable[[Tensor, ModelConfig, torch.Generator], None]] = {
    "log_range": _log_range,
    "step_size": _step_size,
    "uniform_input": _uniform_input,
    "uniform_output": _uniform_output,
}


def initial_value(spec: ParamSpec, config: ModelConfig, seed: int) -> Tensor:
    """The full fp32 CPU tensor of one parameter; a pure function of (spec, config, seed)."""
    digest = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.zeros(spec.shape, dtype=torch.float32, device="cpu")
    if spec.role == "ones":
        value.fill_(1.0)
    elif spec.role == "conv":
        bound = 1 / math.sqrt(spec.shape[-1])
        value.uniform_(-bound, bound, generator=generator)
    elif spec.role in ("input", "embedding"):
        _draw(config.init_method, value, config, generator)
    elif spec.role == "output":
        _draw(config.output_init_method, value, config, generator)
    elif spec.role in _RECURRENT:
        _RECURRENT[spec.role](value, config, generator)
    elif spec.role.startswith("uniform "):
        bound = float(spec.role.removeprefix("uniform "))
        value.uniform_(-bound, bound, generator=generator)
    elif spec.role != "zeros":
        raise ValueError(f"unknown initialiser role {spec.role!r} of {spec.name}")
    return value


def cut(value: Tensor, part: Slice) -> Tensor:
    """The local shard of a full tensor, as a copy; the tensor itself if the shard covers it."""
    if part.dim is None or part.local_shape == part.shape:
        return value
    return value.narrow(part.dim, part.start, part.stop - part.start).clone()


def init_weights(
    module: nn.Module,
    logical: Mapping[str, str],
    specs: Mapping[str, ParamSpec],
    config: ModelConfig,
    seed: int,
    *,
    slices: Callable[[ParamSpec], Slice],
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    """Replace every meta parameter of `module` by its initial local shard, in place; shared parameters stay shared.

    Args:
        module: any part of the model.
        logical: its parameter names -> logical names (`{n: n}` for the complete model).
        specs: logical name -> spec.
        config: config of the complete model.
        seed: seed of the run.
        slices: this rank's slice of a parameter, such as `lambda spec: slice_of(spec.shape, spec.cut, rank, size)`.
        device: device of the new parameters.
        dtype: dtype of the new parameters.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for name, p in owner.named_parameters(recurse=False):
            owners.setdefault(id(p), []).append((owner, name))
    for name, p in list(module.named_parameters()):
        spec = specs[logical[name]]
        value = cut(initial_value(spec, config, seed), slices(spec)).to(device=device, dtype=dtype)
        fresh = nn.Parameter(value, requires_grad=p.requires_grad)
        for owner, local in owners[id(p)]:
            setattr(owner, local, fresh)
