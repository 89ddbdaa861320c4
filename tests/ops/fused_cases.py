"""What the tests of fused kernels share: where they run, and their error against the token-by-token form in fp64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

NO_GPU = not torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not NO_GPU, reason="on a GPU machine kernels are compiled, not interpreted")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="no CUDA device")]),
]
device_matrix = pytest.mark.parametrize("device", DEVICES)


def mostly_slow(names: str, fast: Sequence[Any], slow: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize over both; the second only in the whole suite: the interpreter takes seconds for each."""
    marked = [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.slow) for x in slow]
    return pytest.mark.parametrize(names.split(",") if "," in names else names, [*fast, *marked])


def plant(owner: Any, name: str, right: str, wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run kernels of which one line is wrong: `owner.name` becomes its own module with `wrong` in place of `right`."""
    text = Path(str(getattr(owner, name).__file__)).read_text()
    assert right in text
    file = folder / f"planted_{name}.py"
    file.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(owner, name, planted)


def relative(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact` [any shape], formed in fp64 on the CPU."""
    wide = exact.detach().cpu().double()
    return float((got.detach().cpu().double() - wide).norm() / wide.norm().clamp_min(1e-30))


def boundaries(b: int, t: int, device: str, share: float = 0.06) -> Tensor:
    """Document numbers [b, t] with a boundary at about this share of the tokens."""
    return (torch.rand(b, t, generator=torch.Generator().manual_seed(8)) < share).cumsum(1).to(device)


def results(run: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of `run(*leaves)` and the gradients of all leaves from fixed random upstream gradients."""
    outputs = list(run(*leaves))
    gen = torch.Generator().manual_seed(3)
    ups = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x.device) for x in outputs]
    total = sum((x.double() * up).sum() for x, up in zip(outputs, ups, strict=True))
    return [*outputs, *torch.autograd.grad(total, list(leaves))]
