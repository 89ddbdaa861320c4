"""Export to and import from Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linear_neox.models import Checkpoint
from megatron.checkpoint.find import newest_checkpoint
from megatron.export.card import CardInfo
from megatron.export.hf import ExportResult, export_checkpoint
from megatron.interop.import_hf import Imported, import_folder


def export_hf(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = 5_000_000_000,
    keep_padding: bool = False,
    **card: Any,
) -> ExportResult:
    """Write a folder that `AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)` loads.

    The folder's logits are compared with the checkpoint's before it gets its final name.

    Args:
        checkpoint: a `global_step<N>` folder, a save or run folder (exports the newest), or a loaded `Checkpoint`.
        output: a new folder.
        dtype: auto (as stored), float32, bfloat16, float16 or float64.
        max_shard_bytes: bytes of weights per file.
        keep_padding: keep the padding rows of the vocabulary.
        **card: entries of the model card: `license`, `languages`, `datasets` and the other fields of
            `megatron.export.card.CardInfo`.

    Returns:
        `.folder`, `.family`, `.parameters`, `.difference` (largest relative logit difference), `.notes`.

    Raises:
        ExportError: the folder is not empty, or the logits differ.
        CheckpointError: the checkpoint does not exist, or is damaged.
    """
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else newest_checkpoint(checkpoint)
    stated = CardInfo(**card) if card else None
    options: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "keep_padding": keep_padding}
    return export_checkpoint(path, output, stated=stated, **options)


def import_hf(folder: str | Path, output: str | Path) -> Imported:
    """Import a Hugging Face folder as a checkpoint.

    Supports our exports, and MetaLA, Based, JRT, Mamba, GPT-NeoX, Llama, Mistral, Bloom and MPT.

    Args:
        folder: folder with config.json and the weights.
        output: save folder to write; `load_checkpoint(output)` and the key `load` of a run read it.

    Returns:
        `.checkpoint` (the folder), `.config` (the `ModelConfig`), `.notes`.

    Raises:
        ExportError: the folder is not supported, or its weights do not match its configuration.
    """
    return import_folder(folder, output)
