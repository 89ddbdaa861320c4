"""Every family with its weights on disk or in CPU memory by accelerate's hooks: logits and texts are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.export.families import BATCH, FAMILIES, MASK

pytest.importorskip("accelerate")

Load = Callable[..., Any]


def device_map(family: str, kept: tuple[str, ...]) -> dict[str, str]:
    """Every module on disk but those `kept`; a tied head stays with its embedding, as any model's does."""
    layers = [f"model.layers.{i}" for i in range(FAMILIES[family].num_layers)]
    names = ["model.embed_tokens", *layers, "model.final_norm", "lm_head"]
    places = {name: "cpu" if name in kept else "disk" for name in names}
    return places | ({"lm_head": places["model.embed_tokens"]} if FAMILIES[family].tie_embeddings else {})


def check(model: Any, want: Any) -> None:
    """Logits, a left-padded batch, a packed row and texts of `model` are those of `want`."""
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
    for more in ({}, {"attention_mask": MASK}, {"position_ids": places}):
        inputs: dict[str, Any] = {"input_ids": BATCH, **more}
        with torch.inference_mode():
            assert torch.allclose(model(**inputs).logits, want(**inputs).logits, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": MASK}
    made = model.generate(BATCH, **options)
    assert torch.equal(made, want.generate(BATCH, **options))
    assert torch.equal(made, model.generate(BATCH, use_cache=False, **options))


KEPT = {"everything": (), "all_but_embedding": ("model.embed_tokens",), "most_layers": ("model.embed_tokens", "model.layers.0")}
"""What is on disk -> what is not."""


@pytest.mark.parametrize("what", KEPT)
def test_disk(load: Load, family: str, folder: Path, tmp_path: Path, what: str) -> None:
    places = device_map(family, KEPT[what])
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, device_map=places, offload_folder=tmp_path, dtype=torch.float32
    )
    assert any(p.is_meta for p in model.parameters())
    check(model, load())


def test_cpu_offload(load: Load) -> None:
    """`accelerate.cpu_offload`: each module's weights come from a copy when it is called."""
    from accelerate import cpu_offload

    model = cpu_offload(load(), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    check(model, load())


def test_device_map_auto(load: Load, folder: Path) -> None:
    check(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, device_map="auto"), load())
