"""A model for lm-eval from what lies on disk: a checkpoint of any mesh by our adapter, an exported folder by stock `hf`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM

from megatron.checkpoint.find import find_checkpoint
from megatron.errors import ConfigError, DataError
from megatron.evaluation.forward import open_forward
from megatron.evaluation.lm_eval_model import HarnessLM
from megatron.evaluation.options import HarnessOptions, Prefix
from megatron.evaluation.tasks.shorten import Tokens
from megatron.generation.load import stored_tokenizer
from megatron.parallel.mesh import Mesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelOptions:
    """dtype: auto is fp32 on a CPU and as stored elsewhere. max_length: tokens read at most, None as trained.

    The other fields are those of `HarnessOptions` and `Prefix`; an exported folder can only be read plainly, with its whole
    input as a prefix model's prefix, and stops at an end of document.
    """

    batch_size: int = 8
    max_length: int | None = None
    dtype: str = "auto"
    prompt_mode: str = "plain"
    prefix_scope: str = "context"
    stop_at_eod: bool = True


def is_exported(path: Path) -> bool:
    """Whether `path` is a Hugging Face folder."""
    return (path / "config.json").is_file()


def place_of(path: Path) -> Path:
    """The folder that is read: the newest checkpoint where `path` holds several."""
    if is_exported(path) or (path / "manifest.json").is_file():
        return path
    found = find_checkpoint(str(path))
    assert found is not None
    return found


def open_model(path: Path, options: ModelOptions) -> tuple[LM, Mapping[str, Any]]:
    """(model on this process's accelerator or CPU, metadata of the recall tasks for it).

    Raises:
        ConfigError: options that an exported folder cannot have. CheckpointError: damage.
        DataError: a checkpoint without its tokenizer or length.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise ConfigError(f"unknown dtype '{options.dtype}'", hint=f"auto, {', '.join(DTYPES)}")
    if is_exported(path):
        return _exported(path, options, device)
    dtype = DTYPES.get(options.dtype) or (torch.float32 if device == "cpu" else None)
    place = place_of(path)
    forward, manifest = open_forward(place, Mesh.single(), dtype=dtype, device=device)
    tokenizer = stored_tokenizer(place / "tokenizer", (manifest.facts.get("tokenizer") or {}).get("type"))
    length = options.max_length or manifest.facts.get("seq_length")
    if tokenizer is None or not length:
        what = "tokenizer" if tokenizer is None else "length of its training texts"
        raise DataError(
            f"the checkpoint does not hold the {what}", where=str(place), hint="python eval.py CONFIG, which names it"
        )
    reach = forward.config.layer_options.get("jrt", {}).get("prefix_length", 0)
    prefix = Prefix(reach, options.prompt_mode, options.prefix_scope)
    asked = HarnessOptions(length, options.batch_size, prefix=prefix, stop_at_eod=options.stop_at_eod)
    return HarnessLM(forward, tokenizer, asked), {"tokenizer": Tokens(tokenizer.tokenize_piece, tokenizer.detokenize)}


def _exported(path: Path, options: ModelOptions, device: str) -> tuple[LM, Mapping[str, Any]]:
    """Stock `hf`; the folder's own code is run, as `trust_remote_code` says."""
    from lm_eval.models.huggingface import HFLM

    if options.prompt_mode != "plain" or not options.stop_at_eod:
        raise ConfigError(
            "an exported folder is measured by lm-eval's own hf model",
            where=str(path),
            why="it reads prompts plainly and stops at an end of document",
            hint="measure the checkpoint, or leave --prompt-mode and --no-eod-stop out",
        )
    dtype = options.dtype if options.dtype != "auto" else "float32" if device == "cpu" else "auto"
    model = HFLM(
        pretrained=str(path),
        trust_remote_code=True,
        device=device,
        dtype=dtype,
        batch_size=options.batch_size,
        max_length=options.max_length,
    )
    return model, {"tokenizer": str(path)}
