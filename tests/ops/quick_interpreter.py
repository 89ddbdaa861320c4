"""Triton's CPU interpreter without work whose result is known or thrown away. Only tests use it; results do not change.

Half of a launch's time is such work:

- A launch lists all members of `triton.language` to patch the builtins among them, and so does each call of a function inside a
  kernel. Here they are listed once in a process, and a call inside a launch that has patched the same modules patches nothing.
- Integer sums and products are formed a second time in int64 for an assertion that exists in debug mode only.
- Types of blocks, shapes of tensors and numpy's dtypes are formed again for each operation.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from types import ModuleType
from typing import Any

_done: list[bool] = []


class _Nothing:
    """The scope of a call that has patched nothing."""

    def restore(self) -> None:
        """Nothing to restore."""


def quicken() -> None:
    """Patch the interpreter once for this process, if kernels are interpreted and it restores what it patches (Triton 3.7)."""
    if _done or os.environ.get("TRITON_INTERPRET") != "1":
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    _done.append(True)
    if not hasattr(interpreter, "_LangPatchScope"):
        return
    _list_builtins_once(interpreter)
    _patch_modules_once(interpreter)
    _skip_discarded_checks(interpreter)
    _remember_types(interpreter)


def _list_builtins_once(interpreter: ModuleType) -> None:
    """`_patch_builtin` with the builtins of each owner from its first call, when none of them was patched."""
    is_builtin = interpreter.tl.core.is_builtin
    listed: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
        if owner not in listed:
            listed[owner] = [(name, member) for name, member in inspect.getmembers(owner) if is_builtin(member)]
        for name, member in listed[owner]:
            interpreter._patch_attr(owner, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin  # type: ignore[attr-defined]


def _patch_modules_once(interpreter: ModuleType) -> None:
    """`_patch_lang` that does nothing for functions called by a kernel if their modules are patched."""
    patch, language = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)
    running: list[set[int]] = []  # for each launch that runs, the ids of the modules that it has patched
    left: set[int] = set()  # modules that a call has patched: Triton never restores those
    modules: dict[Any, set[int]] = {}

    def patch_lang(function: Any) -> Any:
        if function not in modules:
            modules[function] = {id(x) for x in function.__globals__.values() if any(x is module for module in language)}
        if running:  # a call inside a launch
            if not modules[function] <= running[-1] | left:
                patch(function)
                left.update(modules[function])
            return _Nothing()
        scope = patch(function)
        restore = scope.restore
        running.append(modules[function])

        def restore_all() -> None:
            running.pop()
            restore()

        scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang  # type: ignore[attr-defined]


def _skip_discarded_checks(interpreter: ModuleType) -> None:
    """No check of overflows, whose assertion is empty without debug mode."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_types(interpreter: ModuleType) -> None:
    """Block types, shapes and dtypes from the first operation that needs them; nothing changes them later."""
    core, numpy_dtype = interpreter.tl.core, interpreter._get_np_dtype
    block_init, scalar_shape, scalar_numel = core.block_type.__init__, core.tuple([]), core.constexpr(1)
    constexpr, dtype_eq, blocks, dtypes = core.constexpr, core.dtype.__eq__, dict[Any, Any](), dict[str, Any]()

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (id(element_ty), *[s.value if isinstance(s, constexpr) else s for s in shape])
        if key not in blocks:
            block_init(self, element_ty, shape)
            numel, shape_of_tensors = constexpr(self.numel), core.tuple([constexpr(s) for s in self.shape])
            blocks[key] = {**self.__dict__, "of_tensors": (numel, shape_of_tensors)}  # holds element_ty: its id stays its own
        self.__dict__.update(blocks[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tensors if type.is_block() else (scalar_numel, scalar_shape)

    def same_dtype(self: Any, other: Any) -> Any:
        return self is other or dtype_eq(self, other)

    def get_numpy_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    core.block_type.__init__, core.tensor.__init__, core.dtype.__eq__ = init_block_type, init_tensor, same_dtype
    interpreter._get_np_dtype = get_numpy_dtype  # type: ignore[attr-defined]
