"""Proof that an exported folder computes what the trainer's model computes, before the folder is given its name.

The packed files are loaded as a package of their own (no module of this project is visible under its name), the weights are
read back from the folder's safetensors, and logits are compared in fp32: of a whole pass, of left-padded rows, and of a prompt
continued token by token through the cache.
"""

from __future__ import annotations

import importlib
import sys
import types
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging as hf_logging

from megatron.errors import ExportError
from megatron.layers.base import Context
from megatron.model.lm import LanguageModel

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit (fp32; the recurrence rounds differently step by step)."""


@dataclass(frozen=True)
class Probe:
    """Tokens [2, s] and what the trainer's model says: logits [2, s, n] plain, and with the first `padding` of row 1 hidden."""

    tokens: Tensor
    padding: int
    prefix: int
    plain: Tensor
    padded: Tensor


def _mask(tokens: Tensor, padding: int) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    return mask


@torch.inference_mode()
def make_probe(model: LanguageModel, vocab_size: int, length: int = 100, padding: int = 7, prefix: int = 40) -> Probe:
    """Run the trainer's model (fp32) on fixed random tokens; logits are cut to the true vocabulary.

    The padded pass has a prefix shorter than what is later read as a prompt, since only then steps can follow a JRT prefill.
    """
    generator = torch.Generator().manual_seed(20)
    tokens = torch.randint(0, vocab_size, (2, length), generator=generator)
    plain, _ = model(tokens)
    padded, _ = model(tokens, Context(mask=_mask(tokens, padding), prefix_length=prefix))
    return Probe(tokens, padding, prefix, plain[..., :vocab_size].clone(), padded[..., :vocab_size].clone())


@contextmanager
def packed_classes(folder: Path, family: str) -> Iterator[types.ModuleType]:
    """The packed modelling module of a folder, imported under a name used nowhere else, forgotten afterwards."""
    name = f"exported_{uuid.uuid4().hex}"
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        importlib.invalidate_caches()
        yield importlib.import_module(f"{name}.modeling_{family}")
    finally:
        sys.dont_write_bytecode = write_bytecode
        for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            del sys.modules[module]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers meanwhile."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def verify_folder(folder: Path, family: str, prefix: str, probe: Probe, native: bool = False) -> float:
    """Largest logit difference, relative to the largest logit, between the probe and the folder's model.

    native: the folder holds no code of its own; transformers' classes are loaded, and what they say of padding is not compared.

    Raises:
        ExportError: it exceeds `TOLERANCE`; the message says in which of the three passes.
    """
    classes = nullcontext(transformers) if native else packed_classes(folder, family)
    with classes as module, _quiet():
        model = getattr(module, f"{prefix}ForCausalLM").from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            passes = _passes(model, probe, {} if native else {"prefix_length": probe.prefix})
    if native:
        shown = _mask(probe.tokens, probe.padding)[..., None]
        passes["left padding"] = tuple(logits * shown for logits in passes["left padding"])  # type: ignore[assignment]
    largest = float(probe.plain.abs().max())
    differences = {what: float((got - want).abs().max()) / largest for what, (got, want) in passes.items()}
    bad = {what: value for what, value in differences.items() if not value <= TOLERANCE}
    if bad:
        raise ExportError(
            "the exported folder computes other logits than the checkpoint and was removed",
            why="; ".join(f"{what}: {value:.2e} of the largest logit" for what, value in bad.items()),
            hint=f"the limit is {TOLERANCE:.0e}; please report this with the checkpoint's manifest.json",
        )
    return max(differences.values())


def _passes(model: Any, probe: Probe, extra: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What -> (the folder's logits, the trainer's) for the three ways of use."""
    tokens, mask = probe.tokens, _mask(probe.tokens, probe.padding)
    prompt = tokens.shape[1] - 8
    first = model(tokens[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True, **extra)
    rows = [first.logits[:, -1]]
    for i in range(prompt, tokens.shape[1]):
        step = model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=first.past_key_values)
        rows.append(step.logits[:, -1])
    return {
        "whole pass": (model(tokens, use_cache=False).logits, probe.plain),
        "left padding": (model(tokens, attention_mask=mask, use_cache=False, **extra).logits, probe.padded),
        "steps through the cache": (torch.stack(rows, 1), probe.padded[:, prompt - 1 :]),
    }
