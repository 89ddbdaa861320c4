"""Memory of one segment of a model: a forward and backward pass on fake tensors under a counter of live storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Mixers choose their chunk length by the lowest log decay of a batch; this is its value with initial weights.
_TYPICAL = -1.0


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages that operations allocate; `peak` can be reset to `now`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is freed; a storage is counted once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked twice for each operation, and answered slowly
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else _TYPICAL  # fake tensors have no values
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


@dataclass(frozen=True)
class Segment:
    """One segment of the chain, in bytes above what was live before it.

    Attributes:
        saved: live after its forward, for its backward.
        forward: peak during its forward.
        backward: peak during its backward, including `saved` and its gradients.
        gradients: gradients of its parameters.
        sent: what context parallelism sends in one pass, forward and backward.
    """

    saved: int
    forward: int
    backward: int
    gradients: int
    sent: int = 0


Cache = dict[tuple[object, ...], Segment]


def measure(run: Callable[[Tensor], Tensor], modules: Sequence[nn.Module], x: Tensor) -> Segment:
    """Run a segment forward and backward; its input `x` is saved by the segment before."""
    _give_storage(modules)
    live = _Live()
    with live:
        live.add(x)
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                live.add(tensor)
        before = live.now
        live.peak = before
        out = run(x)
        saved, forward = live.now - before, live.peak - before
        grad = torch.empty_like(out) if out.dim() else None
        live.peak = live.now
        torch.autograd.backward([out], [grad] if grad is not None else None)
        backward = live.peak - before
    params = {id(p): p for module in modules for p in module.parameters()}
    # Parameters whose gradients come from one matrix product share a storage: count it once.
    storages = [p.grad.untyped_storage() for p in params.values() if p.grad is not None]
    gradients = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    for param in params.values():
        param.grad = None
    return Segment(saved, forward, backward, gradients)


def _give_storage(modules: Sequence[nn.Module]) -> None:
    """Replace what lies on the meta device by fake tensors on the CPU, which operators take for its path."""
    new: dict[int, nn.Parameter] = {}
    for module in (inner for outer in modules for inner in outer.modules()):
        for name, param in module._parameters.items():
            if param is not None and param.is_meta:
                module._parameters[name] = new.setdefault(id(param), nn.Parameter(torch.empty(param.shape, dtype=param.dtype)))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
