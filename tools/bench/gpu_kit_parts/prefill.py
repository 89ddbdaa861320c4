"""Reading a prompt: milliseconds of a whole model's pass that leaves the state and the last logits."""

from __future__ import annotations

from typing import Any

import torch

from megatron.layers.base import Context
from megatron.model.lm import run_blocks
from tools.bench.gpu_kit_parts.models import backend_of, filled, model_config
from tools.bench.gpu_kit_parts.part import Part


def _row(part: Part, mixer: str, size: str, batch: int, length: int) -> dict[str, Any]:
    model = filled(model_config(mixer, size, part.rehearse), part.device, part.dtype)
    tokens = torch.zeros(batch, length, dtype=torch.long, device=part.device)
    ctx = Context(backend=backend_of(part, mixer))

    def last_logits() -> torch.Tensor:
        x, _ = run_blocks(model.model.layers, model.model.embed_tokens(tokens), ctx, model.init_state(batch))
        return model.lm_head(model.model.final_norm(x[:, -1], backend=ctx.backend))

    with torch.inference_mode():
        ms = part.ms(last_logits, 5)
    return {"batch": batch, "length": length, "ms": ms, "tokens_per_s": batch * length / ms * 1e3}


def run(part: Part) -> None:
    """Rows `mixer size batch x length`."""
    for batch, length in [(1, 20)] if part.rehearse else [(16, 2048), (4, 8192), (1, 32768)]:
        for mixer in ("metala", "global", "hybrid"):
            part.row(f"{mixer} 1.3B {batch} x {length}", _row, part, mixer, "1.3B", batch, length)
