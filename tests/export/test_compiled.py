"""Every family under torch.compile (one graph, no breaks) and torch.export: logits, gradients, steps and texts are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.export.families import BATCH, FAMILIES, MASK, TOKENS
from tests.export.test_trainer import losses, trainer

Load = Callable[..., Any]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Graphs of one test are not counted in the next one's limits."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


EVERY_LAYER = pytest.mark.parametrize("family", ["based", "jrt", "hybrid"])
"""Between them all mixers; what a graph holds does not depend on how they are mixed."""
PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
INPUTS: dict[str, dict[str, Tensor]] = {"mask": {"attention_mask": MASK}, "packed": {"position_ids": PLACES}}


@pytest.mark.slow
@EVERY_LAYER
@pytest.mark.parametrize("inputs", INPUTS)
@torch.inference_mode()
def test_forward(load: Load, inputs: str) -> None:
    """One graph for padded rows, one for packed documents; what a backend makes of it is `test_training_step`'s affair."""
    model = load()
    want = model(BATCH, use_cache=False, **INPUTS[inputs]).logits
    got = torch.compile(model, backend="eager", fullgraph=True)(BATCH, use_cache=False, **INPUTS[inputs]).logits
    shown = MASK[..., None] if inputs == "mask" else 1
    assert float(((got - want) * shown).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "metala_untied"])
def test_training_step(load: Load) -> None:
    """Loss and every gradient of one graph for forward and backward."""
    model, plain = load(torch.float64).train(), load(torch.float64).train()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(TOKENS, labels=TOKENS).loss
    loss.backward()
    want = plain(TOKENS, labels=TOKENS).loss
    want.backward()
    assert torch.allclose(loss, want)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-8), name


@pytest.mark.slow
@EVERY_LAYER
@torch.inference_mode()
def test_with_a_cache(load: Load, family: str) -> None:
    """A pass that keeps its state, and steps from it; the model of all kinds of states also as AOTAutograd has it."""
    model, plain = load(), load()
    run = torch.compile(model, backend="aot_eager" if family == "hybrid" else "eager")
    out, want = run(TOKENS, use_cache=True), plain(TOKENS, use_cache=True)
    for i in range(3):
        token = TOKENS[:, i : i + 1]
        out = run(token, past_key_values=out.past_key_values, use_cache=True)
        want = plain(token, past_key_values=want.past_key_values, use_cache=True)
        assert torch.allclose(out.logits, want.logits, atol=1e-4)


def test_trainer(load_family: Load, tmp_path: Path) -> None:
    """`torch_compile` of TrainingArguments."""
    made = trainer(load_family("metala"), tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    plain = trainer(load_family("metala"), tmp_path)
    made.train()
    plain.train()
    assert losses(made) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.slow
def test_inductor(load_family: Load) -> None:
    """The default backend: forward and a training step; on other layers in `tests/ops/test_compile.py`."""
    model, plain = load_family("metala").train(), load_family("metala").train()
    loss = torch.compile(model, fullgraph=True)(TOKENS, labels=TOKENS).loss
    loss.backward()
    want = plain(TOKENS, labels=TOKENS).loss
    want.backward()
    assert torch.allclose(loss, want, atol=1e-5)
    got, wanted = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plain))
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-4


class Logits(torch.nn.Module):
    """Logits alone, as an exported graph has them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


@pytest.mark.slow
@torch.no_grad()
def test_export(load: Load) -> None:
    """`torch.export`, with one graph for all batch sizes and all lengths beyond JRT's prefix of eight."""
    model = load()
    b, s = torch.export.Dim("b", min=1, max=64), torch.export.Dim("s", min=9, max=4096)
    program = torch.export.export(Logits(model), (TOKENS,), dynamic_shapes={"tokens": {0: b, 1: s}}, strict=False)
    for tokens in (TOKENS, TOKENS[:1, :9], torch.randint(2, 64, (3, 150))):
        assert torch.allclose(program.module()(tokens), model(tokens, use_cache=False).logits, atol=1e-3)
