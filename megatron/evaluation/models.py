"""Opens a model on disk for lm-eval: a checkpoint of any mesh with our adapter, an exported folder with stock `hf`."""

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
    """Options of a model.

    Attributes:
        batch_size: rows per pass.
        max_length: maximum number of input tokens, None: as in training.
        dtype: dtype of the weights; auto: fp32 on a CPU, else as stored.
        prompt_mode: see `Prefix.mode`; `plain` for an exported folder.
        prefix_scope: see `Prefix.scope`; an exported folder always uses `whole`.
        stop_at_eod: see `HarnessOptions`; True for an exported folder.
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
    """The folder to read: the newest checkpoint if `path` holds several."""
    if is_exported(path) or (path / "manifest.json").is_file():
        return path
    checkpoint = find_checkpoint(str(path))
    assert checkpoint is not None
    return checkpoint


def open_model(path: Path, options: ModelOptions) -> tuple[LM, Mapping[str, Any]]:
    """Open the model on this process's accelerator or CPU.

    Returns:
        The model, and the metadata of the recall tasks for it.

    Raises:
        ConfigError: options that an exported folder does not support.
        CheckpointError: the checkpoint is damaged.
        DataError: the checkpoint lacks its tokenizer or length.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise ConfigError(f"unknown dtype '{options.dtype}'", hint=f"auto, {', '.join(DTYPES)}")
    if is_exported(path):
        return _exported(path, options, device)
    dtype = DTYPES.get(options.dtype) or (torch.float32 if device == "cpu" else None)
    folder = place_of(path)
    forward, manifest = open_forward(folder, Mesh.single(), dtype=dtype, device=device)
    tokenizer = stored_tokenizer(folder / "tokenizer", (manifest.facts.get("tokenizer") or {}).get("type"))
    length = options.max_length or manifest.facts.get("seq_length")
    if tokenizer is None or not length:
        what = "tokenizer" if tokenizer is None else "length of its training texts"
        raise DataError(
            f"the checkpoint does not hold the {what}", where=str(folder), hint="python eval.py CONFIG, which names it"
        )
    prefix_length = forward.config.layer_options.get("jrt", {}).get("prefix_length", 0)
    prefix = Prefix(prefix_length, options.prompt_mode, options.prefix_scope)
    harness_options = HarnessOptions(length, options.batch_size, prefix=prefix, stop_at_eod=options.stop_at_eod)
    return HarnessLM(forward, tokenizer, harness_options), {"tokenizer": Tokens(tokenizer.tokenize_piece, tokenizer.detokenize)}


def _exported(path: Path, options: ModelOptions, device: str) -> tuple[LM, Mapping[str, Any]]:
    """Stock `hf`; executes the folder's code (`trust_remote_code`)."""
    from lm_eval.models.huggingface import HFLM

    if options.prompt_mode != "plain" or not options.stop_at_eod:
        raise ConfigError(
            "an exported folder is evaluated by lm-eval's own hf model",
            where=str(path),
            why="it reads prompts plainly and stops at an end of document",
            hint="evaluate the checkpoint, or omit --prompt-mode and --no-eod-stop",
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
