"""Blocks that hand the residual stream on in two parts: the same bits as with one tensor, in as many kernels as expected.

On the plain path sums and norms are the same operators in the same order; the fused path is within 2e-6 of the norm in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.engine.base import EngineSettings
from megatron.engine.stages import build_local, run_stages
from megatron.layers.base import Context
from megatron.model.block import Block
from megatron.model.config import ModelConfig
from megatron.model.lm import run_blocks, step_blocks
from megatron.model.norm import Norm
from megatron.parallel.mesh import Mesh
from tests.ops.fused_cases import relative

SHAPE = ModelConfig(32, 16, 4, 2, 24, ("metala",) * 4)
KINDS: dict[str, dict[str, Any]] = {
    "sequential": {},
    "parallel": {"parallel_residual": True},
    "shared norm": {"parallel_residual": True, "shared_norm": True},
    "no MLP": {"mlp": "none", "mlp_width": 0},
    "fp32 stream": {"residual_fp32": True},
    "dropout": {"hidden_dropout": 0.2},
}


def blocks_of(kind: str, dtype: torch.dtype = torch.float32) -> list[Block]:
    config = ModelConfig(**{**vars(SHAPE), **KINDS[kind]})
    local = build_local(config, Mesh.single(), EngineSettings(), torch.device("cpu"))
    found = [module for stage in local.stages for module in stage.modules() if isinstance(module, Block)]
    return [block.to(dtype) for block in found]


def one_by_one(blocks: Sequence[Block], x: Tensor, ctx: Context) -> Tensor:
    for block in blocks:
        x, _ = block(x, ctx)
        assert isinstance(x, Tensor)
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_stream_in_parts_has_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    blocks, ctx = blocks_of(kind, dtype), Context(backend="torch")
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    parameters, found = [p for block in blocks for p in block.parameters()], []
    for run in (one_by_one, lambda blocks, x, ctx: run_blocks(blocks, x, ctx, None)[0]):
        torch.manual_seed(3)
        y = run(blocks, x, ctx)
        assert y.dtype == (torch.float32 if kind == "fp32 stream" else dtype)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["sequential", "no MLP"])
def test_decode_steps_have_the_same_bits(kind: str) -> None:
    blocks, ctx = blocks_of(kind), Context(backend="torch")
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    states = [block.token_mixer.init_state(2, torch.float32, "cpu") for block in blocks]
    y, after = x, []
    for block, state in zip(blocks, states, strict=True):
        y, new = block.step(y, state, ctx)
        after.append(new)
    got, others = step_blocks(blocks, x, states, ctx)
    assert torch.equal(got, y)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(after, others, strict=True) for name in a)


@pytest.mark.parametrize("kind", ["sequential", "parallel", "no MLP"])
def test_the_fused_norm_makes_the_sum(kind: str) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("on a GPU machine kernels are compiled, not interpreted")
    blocks = blocks_of(kind)[:2]
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    names = ("token_norm", "channel_mixer", "channel_norm")
    parameters = [p for block in blocks for name in names if (m := getattr(block, name)) is not None for p in m.parameters()]
    found = []
    for backend in ("torch", "triton"):
        y = run_blocks(blocks, x.requires_grad_(), Context(backend=backend), None)[0]
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    assert max(relative(a, b) for a, b in zip(*found, strict=True)) < 2e-5


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each norm that is formed: whether it forms a sum too."""
    found: list[bool] = []
    plain = Norm.forward

    def counted(self: Norm, *given: Any, added: Tensor | None = None, **named: Any) -> Any:
        found.append(added is not None)
        return plain(self, *given, added=added, **named)

    monkeypatch.setattr(Norm, "forward", counted)
    return found


@pytest.mark.parametrize(("interval", "count"), [(0, 7), (1, 4), (2, 6), (3, 6), (4, 7)])
def test_a_recomputed_segment_stores_one_tensor(interval: int, count: int, sums: list[bool]) -> None:
    """Between segments the stream is one tensor; within them each block but the first begins with a sum."""
    local = build_local(SHAPE, Mesh.single(), EngineSettings(), torch.device("cpu"))
    y = run_stages(local.stages, (torch.zeros(1, 4, dtype=torch.long),), interval)
    assert isinstance(y, Tensor) and sum(sums) == count
    assert torch.equal(y, run_stages(local.stages, (torch.zeros(1, 4, dtype=torch.long),)))


def test_hooks_of_blocks_see_one_tensor(sums: list[bool]) -> None:
    """A hook's result replaces the stream: neither its block nor the one in front hands on parts."""
    blocks, seen = blocks_of("sequential"), []
    blocks[2].register_forward_hook(lambda module, given, result: seen.extend((given[0], result[0])))
    x = torch.randn(1, 3, 16)
    run_blocks(blocks, x, Context(), None)
    assert all(isinstance(part, Tensor) for part in seen) and len(seen) == 2
    assert sum(sums) == 4 + 1


def test_hooks_of_stages_and_of_their_blocks_see_one_tensor(sums: list[bool]) -> None:
    """In training, with and without recomputed segments."""
    local, seen = build_local(SHAPE, Mesh.single(), EngineSettings(), torch.device("cpu")), []
    tokens = (torch.zeros(1, 4, dtype=torch.long),)
    local.stages[2].body.register_forward_hook(lambda module, given, result: seen.extend((given[0], result[0])))
    for interval, formed in ((0, 4 + 1), (4, 4 + 1)):
        sums.clear()
        run_stages(local.stages, tokens, interval)
        assert sum(sums) == formed
    local.stages[3].register_forward_hook(lambda module, given, result: seen.extend((given[0][0], result[0])))
    run_stages(local.stages, tokens)
    assert all(isinstance(part, Tensor) for part in seen) and len(seen) == 8


def test_a_module_around_a_block_gets_one_tensor(sums: list[bool]) -> None:
    """One of another signature too: it is called as blocks always were."""

    class Around(nn.Module):
        def __init__(self, block: Block) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, ctx: Context, state: Any = None) -> Any:
            assert isinstance(x, Tensor)
            return self.block(x, ctx, state)

    blocks: list[Any] = list(blocks_of("sequential"))
    x = torch.randn(1, 3, 16)
    expected = run_blocks(blocks, x, Context(), None)[0]
    blocks[1] = Around(blocks[1])
    sums.clear()
    assert torch.equal(run_blocks(blocks, x, Context(), None)[0], expected) and sum(sums) == 4 + 1
