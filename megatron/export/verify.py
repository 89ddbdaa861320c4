"""Proof that an exported folder computes what the trainer's model computes, before the folder is given its name.

The packed files are loaded as a package of their own (no module of this project is visible under its name), the weights are
read back from the folder's safetensors, and logits are compared in fp32 in the ways in which people use a folder: see `_USES`.
`generate` is among them because what it hands to a model changes with transformers: a folder that is right in a single pass can
still lose its state from the second new token on.
"""

from __future__ import annotations

import importlib
import sys
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging as hf_logging

from megatron.errors import ExportError
from megatron.layers.base import Context, input_names, inputs_of
from megatron.model.lm import LanguageModel

TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit (fp32; the recurrence rounds differently step by step)."""
NEW_TOKENS = 6
"""How far `generate` is followed."""


@dataclass(frozen=True)
class Probe:
    """Tokens and what the trainer's model says of them; all logits are cut to the true vocabulary.

    Attributes:
        tokens: [2, s]; in the second row the first `padding` are hidden where padding is meant.
        prefix: length of the prefix of prefix layers where tokens follow it.
        boundary: where the second document begins when each row holds two.
        plain: logits [2, s, n] without padding.
        padded: the same with padding and the prefix.
        packed: the same of two documents in a row.
        chosen: [2, NEW_TOKENS], the greedy continuation of the padded rows.
        following: logits [2, NEW_TOKENS, n] that these were chosen from.
    """

    tokens: Tensor
    padding: int
    prefix: int
    boundary: int
    plain: Tensor
    padded: Tensor
    packed: Tensor
    chosen: Tensor
    following: Tensor

    @property
    def mask(self) -> Tensor:
        """[2, s], 0 where padding is hidden."""
        mask = torch.ones_like(self.tokens)
        mask[1, : self.padding] = 0
        return mask


@torch.inference_mode()
def make_probe(
    model: LanguageModel, vocab_size: int, length: int = 100, padding: int = 7, prefix: int = 40, boundary: int = 37
) -> Probe:
    """Run the trainer's model (fp32) on fixed random tokens.

    The padded pass has a prefix shorter than what is later read as a prompt, since only then steps can follow a JRT prefill.
    """
    table = model.model.embed_tokens.positions
    if table is not None:  # all of it must fit
        length = min(length, table.shape[0] - NEW_TOKENS)
        padding, prefix, boundary = min(padding, length // 4), min(prefix, length // 2), min(boundary, length // 2)
    generator = torch.Generator().manual_seed(20)
    tokens = torch.randint(0, vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0

    mixers = [block.token_mixer for block in model.model.blocks()]
    own = set(input_names(mixers))

    def logits(tokens: Tensor, values: Mapping[str, Any] | None = None, **context: Any) -> Tensor:
        """Those of the real vocabulary; `values` are inputs of mixers, where the model has some that read them."""
        inputs = inputs_of(mixers, {name: value for name, value in (values or {}).items() if name in own})
        return model(tokens, Context(**context, inputs=inputs))[0][..., :vocab_size].clone()

    documents = (torch.arange(length) >= boundary).long().expand(2, -1)
    packed = logits(tokens, {"prefix_per_document": True}, segment_ids=documents)
    text, shown, following = tokens, mask, list[Tensor]()
    for _ in range(NEW_TOKENS):
        following.append(logits(text, {"prefix_length": prefix}, mask=shown)[:, -1])
        text = torch.cat([text, following[-1].argmax(-1, keepdim=True)], 1)
        shown = F.pad(shown, (0, 1), value=1)
    padded = logits(tokens, {"prefix_length": prefix}, mask=mask)
    return Probe(tokens, padding, prefix, boundary, logits(tokens), padded, packed, text[:, length:], torch.stack(following, 1))


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

    Args:
        folder: as written, under any name.
        family: ending of its modelling file.
        prefix: of its class names.
        probe: what the trainer's model says.
        native: the folder holds no code of its own; transformers' classes are loaded, what they say of padding is not compared
            and they are not asked to tell documents apart.

    Raises:
        ExportError: it exceeds `TOLERANCE`, or the folder cannot be used at all; the message says in which use.
    """
    classes = nullcontext(transformers) if native else packed_classes(folder, family)
    with classes as module, _quiet():
        model = getattr(module, f"{prefix}ForCausalLM").from_pretrained(folder, dtype=torch.float32).eval()
        differences = {what: _difference(use, model, probe, native, what) for what, use in _USES.items()}
    bad = {what: value for what, value in differences.items() if not value <= TOLERANCE}
    if bad:
        raise ExportError(
            "the exported folder computes other logits than the checkpoint and was removed",
            why="; ".join(f"{what}: {value:.2e} of the largest logit" for what, value in bad.items()),
            hint=f"the limit is {TOLERANCE:.0e}; please report this with the checkpoint's manifest.json",
        )
    return max(differences.values())


def _difference(use: _Use, model: Any, probe: Probe, native: bool, what: str) -> float:
    """How far apart the two models are in one use, relative to the largest logit."""
    try:
        with torch.inference_mode():
            pair = use(model, probe, native)
    except Exception as error:  # whatever transformers or the packed code raises, a person gets one message
        raise ExportError(
            "the exported folder cannot be used as transformers users do and was removed",
            where=f"{what}, transformers {transformers.__version__}",
            why=f"{type(error).__name__}: {error}",
            hint="docs/compatibility.md lists the versions that folders are proved with",
        ) from error
    return 0.0 if pair is None else float((pair[0] - pair[1]).abs().max() / probe.plain.abs().max())


_Use = Callable[[Any, Probe, bool], tuple[Tensor, Tensor] | None]
"""(the folder's model, probe, native) -> (its logits, the trainer's); None where there is nothing to compare."""


def _extra(model: Any, probe: Probe, native: bool) -> dict[str, Any]:
    """The prefix of the probe's padded passes, where the model has layers that read one."""
    return {} if native or "prefix_length" not in model.model.input_names() else {"prefix_length": probe.prefix}


def _whole_pass(model: Any, probe: Probe, native: bool) -> tuple[Tensor, Tensor]:
    return model(probe.tokens, use_cache=False).logits, probe.plain


def _left_padding(model: Any, probe: Probe, native: bool) -> tuple[Tensor, Tensor]:
    logits = model(probe.tokens, attention_mask=probe.mask, use_cache=False, **_extra(model, probe, native)).logits
    shown = probe.mask[..., None] if native else 1
    return logits * shown, probe.padded * shown


def _cached_steps(model: Any, probe: Probe, native: bool) -> tuple[Tensor, Tensor]:
    tokens, mask = probe.tokens, probe.mask
    prompt = tokens.shape[1] - 8
    out = model(tokens[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True, **_extra(model, probe, native))
    rows = [out.logits[:, -1]]
    for i in range(prompt, tokens.shape[1]):
        cache = {_CACHE: getattr(out, _CACHE)}
        out = model(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], use_cache=True, **cache)
        rows.append(out.logits[:, -1])
    return torch.stack(rows, 1), probe.padded[:, prompt - 1 :]


def _packed_documents(model: Any, probe: Probe, native: bool) -> tuple[Tensor, Tensor] | None:
    if native:
        return None
    places = torch.arange(probe.tokens.shape[1])
    places = torch.where(places < probe.boundary, places, places - probe.boundary)
    return model(probe.tokens, position_ids=places[None], use_cache=False).logits, probe.packed


class _Follow(transformers.LogitsProcessor):
    """Lets `generate` choose the trainer's tokens, so that a near tie does not part the two."""

    def __init__(self, chosen: Tensor, start: int) -> None:
        self.chosen, self.start = chosen, start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores [b, n] with the next token of `chosen` far above all others."""
        return F.one_hot(self.chosen[:, input_ids.shape[1] - self.start], scores.shape[-1]).to(scores.dtype)


def _generated(model: Any, probe: Probe, native: bool, use_cache: bool) -> tuple[Tensor, Tensor]:
    model.generation_config.eos_token_id = None
    out = model.generate(
        probe.tokens,
        attention_mask=probe.mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=transformers.LogitsProcessorList([_Follow(probe.chosen, probe.tokens.shape[1])]),
        **_extra(model, probe, native),
    )
    return torch.stack(out.logits, 1), probe.following


_CACHE = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
_USES: dict[str, _Use] = {
    "whole pass": _whole_pass,
    "left padding": _left_padding,
    "steps through the cache": _cached_steps,
    "packed documents": _packed_documents,
    "greedy generation with the cache": partial(_generated, use_cache=True),
    "greedy generation without the cache": partial(_generated, use_cache=False),
}
"""What is compared before a folder is kept; all generation is of a left-padded batch."""
