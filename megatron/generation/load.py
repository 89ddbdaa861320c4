"""Loads model and tokenizer of a checkpoint of any mesh, ready to run on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron.checkpoint.load import read_full_weights
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.data.tokenizers import Tokenizer, build_tokenizer
from megatron.errors import CheckpointError
from megatron.model.build import build_model
from megatron.model.config import ModelConfig
from megatron.model.lm import LanguageModel

_VOCABULARY = {"HFTokenizer": ".json", "GPT2BPETokenizer": ".json", "SPMTokenizer": ".model", "TiktokenTokenizer": ".tiktoken"}


def filled_model(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    where: str | None = None,
) -> LanguageModel:
    """A `LanguageModel` in evaluation mode holding these full weights (logical name -> tensor; no entry for a tied head).

    Args:
        config: the model.
        weights: complete ones, of one device.
        dtype: of the parameters, None keeps each as it is.
        device: of the parameters.
        where: named in errors.

    Raises:
        CheckpointError: a weight is missing, unknown, or of another shape than the configuration says.
    """
    with torch.device("meta"):
        model = build_model(config)
    state = {name: nn.Parameter(t.to(device=device, dtype=dtype or t.dtype)) for name, t in weights.items()}
    if config.tie_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # the same Parameter: assigning keeps the tie
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise CheckpointError("the weights do not fit the model", where=where, why=reason) from None
    if torch.device(device).type == "cuda":
        for block in model.model.blocks():
            block.pack_weights()  # a decode step would copy the projections' weights at every token otherwise
    return model.eval()


def model_config_of(manifest: Manifest, where: str) -> ModelConfig:
    """The model that a manifest describes; a description of another release raises CheckpointError."""
    try:
        return ModelConfig.from_dict(manifest.model_config)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError("the checkpoint's model description cannot be read", where=where, why=str(error)) from None


def load_model(
    checkpoint: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[LanguageModel, Manifest]:
    """The model of a `global_step<N>` folder and its manifest; damage raises CheckpointError."""
    manifest = read_manifest(checkpoint)
    config = model_config_of(manifest, str(checkpoint))
    weights = read_full_weights(checkpoint)
    return filled_model(config, weights, dtype=dtype, device=device, where=str(checkpoint)), manifest


def stored_tokenizer(folder: Path, kind: str | None = None) -> Tokenizer | None:
    """The tokenizer kept in a checkpoint's `tokenizer/` folder, None when there is none.

    Args:
        folder: that folder, which may be absent.
        kind: NeoX's `tokenizer_type`; guessed from the files when None.

    Raises:
        DataError: the files are damaged or of another kind.
    """
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if kind is None and files:
        kind = _kind_of(files)
    if kind is None or not (files or kind == "CharLevelTokenizer"):
        return None
    if kind == "HFGPT2Tokenizer":
        return build_tokenizer(kind, folder)
    candidates = [path for path in files if path.suffix == _VOCABULARY.get(kind)] or files
    vocabulary = min(candidates, key=lambda path: len(path.name), default=None)  # a rank file's settings have its name and more
    others = [path for path in files if path != vocabulary]
    return build_tokenizer(kind, vocabulary, others[0] if others else None)


def _kind_of(files: Sequence[Path]) -> str:
    """The `tokenizer_type` that files of these names are of."""
    names, suffixes = {path.name for path in files}, {path.suffix for path in files}
    if names & {"tokenizer_config.json", "special_tokens_map.json"} and names & {"tokenizer.json", "merges.txt"}:
        return "HFGPT2Tokenizer"
    kinds = {".tiktoken": "TiktokenTokenizer", ".model": "SPMTokenizer", ".txt": "GPT2BPETokenizer", ".bpe": "GPT2BPETokenizer"}
    return next((kind for suffix, kind in kinds.items() if suffix in suffixes), "HFTokenizer")
