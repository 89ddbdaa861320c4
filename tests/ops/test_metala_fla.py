"""The adapter to flash-linear-attention: its documents as sequences, and, where the package is installed, its numbers.

fp32 against fp64: 5e-5 of the norm (their kernels use tf32-shaped products and base-2 gates).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from megatron.ops import dispatch
from megatron.ops.metala import metala
from megatron.ops.scan import scan_recurrent
from tests.ops.fused_cases import NO_GPU, boundaries, device_matrix, relative, results

HAS_FLA = importlib.util.find_spec("fla") is not None


def leaves_for(b: int, t: int, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(t)
    h, k, v = 1 if device == "cpu" and t > 64 else 2, 16, 32  # the interpreter runs a head after the other
    shapes: Sequence[tuple[int, ...]] = ((b, t, h, k), (b, t, h, k), (b, t, h, v), (b, t, h, v), (h, k), (b, h, k, v))
    leaves = [torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes]
    leaves[1] = leaves[1] + 2
    return [x.to(device, torch.float32).requires_grad_() for x in leaves]


def worst(b: int, t: int, device: str, with_state: bool, ids: Tensor | None, mask: Tensor | None = None) -> float:
    leaves = leaves_for(b, t, device)
    leaves = leaves if with_state else leaves[:5]

    def run(backend: str, *x: Tensor) -> tuple[Tensor, ...]:
        state = x[5] if with_state else None
        y, last = metala(*x[:5], state=state, segment_ids=ids, mask=mask, backend=backend)
        return (y if mask is None else y * mask[..., None, None], last)

    exact = results(lambda *x: run("reference", *x), [x.detach().double().requires_grad_() for x in leaves])
    got = results(lambda *x: run("fla", *x), leaves)
    return max(relative(a, b) for a, b in zip(got, exact, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_FLA, reason="flash-linear-attention is not installed: pip install flash-linear-attention==0.6.0")
@device_matrix
@pytest.mark.parametrize("documents", [False, True])
def test_the_package_computes_what_the_reference_does(device: str, documents: bool) -> None:
    if NO_GPU:
        from tests.ops.fla_interpreter import patch_fla

        dispatch.chosen("metala", "fla", torch.device("cpu"))  # imports the package
        patch_fla()
    ids = boundaries(2, 70, device) if documents else None
    mask = torch.ones(2, 70, device=device)
    mask[1, :5] = 0
    assert worst(2, 70, device, True, ids, None if documents else mask) < 5e-5


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, initial_state: Tensor | None, output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What chunk_gla 0.6.0 is documented to do, token by token: one row, or sequences of one row one after the other."""
    assert output_final_state and g.dtype == torch.float32 and all(x.is_contiguous() for x in (q, k, v, g))
    if cu_seqlens is None:
        return scan_recurrent(q, k, v, g, scale=scale, state=initial_state)
    assert q.shape[0] == 1
    parts = []
    for i, (start, stop) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        state = None if initial_state is None else initial_state[i : i + 1]
        parts.append(scan_recurrent(*(x[:, start:stop] for x in (q, k, v, g)), scale=scale, state=state))
    return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts])


@pytest.fixture
def fla_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package replaced by `stand_in`, whether or not it is installed; the tables of paths as they were, afterwards."""
    packages = {name: types.ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.gla")}
    packages["fla.ops.gla"].chunk_gla = stand_in  # type: ignore[attr-defined]
    for name, module in packages.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "megatron.ops.metala.fla", raising=False)
    monkeypatch.setitem(dispatch._paths, "metala", {n: f for n, f in dispatch._paths["metala"].items() if n != "fla"})
    monkeypatch.delitem(dispatch._absent, ("metala", "fla"), raising=False)


@pytest.mark.usefixtures("fla_stand_in")
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_arguments_are_mapped(with_state: bool, documents: bool) -> None:
    """States of rows become states of sequences and back; nothing crosses a boundary or a row."""
    ids = boundaries(3, 20, "cpu", 0.2) if documents else None
    assert worst(3, 20, "cpu", with_state, ids) < 1e-5


@pytest.mark.usefixtures("fla_stand_in")
def test_other_operators_are_chosen_automatically() -> None:
    cpu = torch.device("cpu")
    assert dispatch.chosen("metala", "fla", cpu) == "fla"
    import megatron.ops.conv  # noqa: F401

    assert dispatch.chosen("conv", "fla", cpu) == "torch"


def test_without_the_package_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fla", "fla.ops", "fla.ops.gla"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "megatron.ops.metala.fla", raising=False)
    monkeypatch.setitem(dispatch._paths, "metala", {n: f for n, f in dispatch._paths["metala"].items() if n != "fla"})
    monkeypatch.delitem(dispatch._absent, ("metala", "fla"), raising=False)
    with pytest.raises(ValueError, match="no fla path here: .*fla"):
        dispatch.chosen("metala", "fla", torch.device("cpu"))
