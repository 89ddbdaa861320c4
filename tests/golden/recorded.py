"""What each mixer and block of a model gives, under the names of the golden files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, Tensor]]:
    """Outputs of every mixer and block of the passes inside.

    Args:
        model: an exported model.

    Yields:
        `layer<i>.mixer_out` and `layer<i>.out`, each (batch, tokens, channels); filled by each pass.
    """
    seen: dict[str, Tensor] = {}
    handles = []
    for i, block in enumerate(model.model.layers):
        for part, module in ((f"layer{i}.mixer_out", block.token_mixer), (f"layer{i}.out", block)):

            def keep(_: Any, __: Any, output: Any, part: str = part) -> None:
                seen[part] = output[0]

            handles.append(module.register_forward_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()
