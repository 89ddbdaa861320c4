"""What a Triton kernel may assume of its tensors: their device is current, tokens are evenly spaced, rows of a state are dense.

Kernels get raw pointers: a violated assumption would corrupt memory or results without an error.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

bf16_is_emulated = False
"""Set by tests that make Triton's interpreter compute in bf16."""


def fit(x: Any, *shape: int, dense: bool = False, dtype: torch.dtype | None = None) -> Any:
    """A tensor broadcast to `shape`, as the plain paths broadcast it: kernels address it by this shape. None stays None.

    Args:
        x: a tensor, or None.
        shape: shape that the kernel assumes.
        dense: whether the kernel also assumes contiguous elements.
        dtype: dtype that the kernel reads; None for that of x.

    Raises:
        ValueError: x does not broadcast to it.
    """
    if x is None:
        return None
    if tuple(x.shape) != shape:
        try:
            x = x.expand(shape).contiguous()
        except RuntimeError:
            raise ValueError(f"a tensor of shape {list(x.shape)} where {list(shape)} is needed") from None
    x = x if dtype is None else x.to(dtype)
    return x.contiguous() if dense else x


def check_interpreted(x: Tensor) -> None:
    """Refuse bf16 matrix products on a CPU.

    Raises:
        ValueError: Triton's interpreter would multiply the bits of the numbers as integers.
    """
    if x.dtype == torch.bfloat16 and not x.is_cuda and not bf16_is_emulated:
        raise ValueError("Triton's interpreter cannot multiply bf16: use fp32, or kernel_backend torch, on a CPU")


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which kernels run on the device of `tensor`; does nothing on a CPU.

    Triton launches on the current CUDA device and its stream, and custom operators set no guard of their own: a model on
    `cuda:1` while `cuda:0` is current (an exported folder with a `device_map`, a notebook) would read another device's memory.

    Args:
        tensor: any argument of the kernel.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def token_rows(x: Tensor) -> Tensor:
    """x with a dense row per token and evenly spaced rows; copied only if necessary.

    Args:
        x: [b, t, ...]; columns of a packed projection are not copied.
    """
    width, dense = 1, True
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        dense, width = dense and (size == 1 or stride == width), width * size
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * token_stride(x)
    return x if dense and even else x.contiguous()


def head_rows(x: Tensor) -> Tensor:
    """x with contiguous heads in every row; copied only if necessary.

    Args:
        x: [b, h, d], one token per row; rows may have gaps between them.
    """
    dense = x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
    return x if dense else x.contiguous()


def token_stride(x: Tensor) -> int:
    """Elements from one token to the next, counted over all rows of the batch: token (i, j) is row i * t + j.

    With one token per row the stride of the token dimension is arbitrary: PyTorch gives a dimension of size 1 any stride.

    Args:
        x: [b, t, ...], as returned by `token_rows`.
    """
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def check_in_place(state: Tensor, row: tuple[int, ...], dtype: torch.dtype, like: Tensor, slots: Tensor | None) -> None:
    """Check the layout and dtype of a state for kernels, which address a row of it by its shape alone.

    Args:
        state: [slots, *row]; rows may have gaps between them, as in a server's pages.
        row: shape of one row.
        dtype: dtype that the kernel stores.
        like: a tensor [b, ...] of the same step, on the required device.
        slots: int [b]; None if batch row i uses row i of the state.

    Raises:
        ValueError: names the mismatch.
    """
    dense = tuple(state.shape[1:]) == row and (len(state) == 0 or state[0].is_contiguous())
    dense = dense and (len(state) < 2 or state.stride(0) >= state[0].numel())
    if not dense or state.dtype != dtype or state.device != like.device:
        raise ValueError(
            f"a step in place needs a {dtype} state [slots, {', '.join(map(str, row))}] of dense rows on {like.device}, not "
            f"{state.dtype} {list(state.shape)} with strides {list(state.stride())} on {state.device}"
        )
    if slots is None and len(state) < len(like):
        raise ValueError(f"{len(like)} rows need as many rows of state, which has {len(state)}")
    if slots is not None and (slots.dtype not in (torch.int32, torch.int64) or slots.shape != like.shape[:1]):
        raise ValueError(f"slots are {len(like)} integers, not {slots.dtype} {list(slots.shape)}")
    if slots is not None and (slots.device != like.device or not slots.is_contiguous()):
        raise ValueError(f"slots are dense and on {like.device}, not on {slots.device} with stride {slots.stride()}")
