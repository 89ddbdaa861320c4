"""bf16 in Triton's CPU interpreter, which keeps it as raw 16-bit integers and computes on those.

`emulate_bf16()` makes every operation on bf16 values go through fp32 and round its result to nearest even, as the hardware does
for loads, stores and conversions; products (`tl.dot`) accumulate in fp32. Only tests use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from megatron.ops import kernel_arguments

_done: list[bool] = []


def _to_float(raw: Any) -> Any:
    return (np.asarray(raw).astype(np.uint32) << 16).view(np.float32)


def _to_raw(value: Any) -> Any:
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return interpreter.TensorHandle(_to_float(handle.data), tl.float32) if _is_bf16(handle) else handle


def _through_fp32(name: str) -> None:
    builder, handle_type = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain = getattr(builder, name)

    def operation(self: Any, *arguments: Any) -> Any:
        if not any(isinstance(a, handle_type) and _is_bf16(a) for a in arguments):
            return plain(self, *arguments)
        result = plain(self, *[_widened(a) if isinstance(a, handle_type) else a for a in arguments])
        return result if result.data.dtype == np.bool_ else handle_type(_to_raw(result.data), tl.bfloat16)

    setattr(builder, name, operation)


def _patch_casts() -> None:
    builder, handle_type = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_cast, plain_convert = builder.cast_impl, builder.create_fp_to_fp

    def cast(self: Any, source: Any, target: Any) -> Any:
        wanted = target.scalar
        if wanted == tl.bfloat16 and not _is_bf16(source):
            return handle_type(_to_raw(source.data.astype(np.float32)), tl.bfloat16)
        if _is_bf16(source) and wanted != tl.bfloat16:
            wide = _widened(source)
            return wide if wanted == tl.float32 else plain_cast(self, wide, target)
        return plain_cast(self, source, target)

    def convert(self: Any, source: Any, target: Any, mode: Any) -> Any:
        if _is_bf16(source) or target.scalar == tl.bfloat16:
            return cast(self, source, target)
        return plain_convert(self, source, target, mode)

    builder.cast_impl, builder.create_fp_to_fp = cast, convert


def emulate_bf16() -> None:
    """Patch the interpreter once for this process."""
    if _done:
        return
    _done.append(True)
    kernel_arguments.bf16_is_emulated = True
    for name in ("binary_op", "unary_op", "create_fma", "create_erf", "create_rsqrt"):
        _through_fp32(name)
    builder = interpreter.InterpreterBuilder
    plain_dot = builder.create_dot
    builder.create_dot = lambda self, a, b, d, *rest: plain_dot(self, _widened(a), _widened(b), d, *rest)
    _patch_casts()
