"""To and from Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linear_neox.models import Checkpoint
from megatron.checkpoint.find import newest_checkpoint
from megatron.export.card import Stated
from megatron.export.hf import Exported, export_checkpoint
from megatron.interop.import_hf import Imported, import_folder


def export_hf(
    checkpoint: str | Path | Checkpoint,
    output: str | Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = 5_000_000_000,
    keep_padding: bool = False,
    **card: Any,
) -> Exported:
    """Write a folder that `AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)` loads.

    The folder is compared with the checkpoint, logit by logit, before it is kept.

    Args:
        checkpoint: a `global_step<N>` folder, a save or run folder (its newest is taken), or a loaded `Checkpoint`.
        output: a new folder.
        dtype: auto (as stored), float32, bfloat16, float16 or float64.
        max_shard_bytes: bytes of weights per file.
        keep_padding: keep vocabulary rows beyond the tokenizer's size.
        **card: what the model card is to say: `license`, `languages`, `datasets` and the other fields of
            `megatron.export.card.Stated`.

    Returns:
        `.folder`, `.family`, `.parameters`, `.difference` (the largest of the compared logits, relative), `.notes`.

    Raises:
        ExportError: the folder is not empty, or its logits differ.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    path = checkpoint.path if isinstance(checkpoint, Checkpoint) else newest_checkpoint(checkpoint)
    stated = Stated(**card) if card else None
    options: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": max_shard_bytes, "keep_padding": keep_padding}
    return export_checkpoint(path, output, stated=stated, **options)


def import_hf(folder: str | Path, output: str | Path) -> Imported:
    """Make a checkpoint of a Hugging Face folder: an export of ours, or one of MetaLA, Based, JRT, Mamba, GPT-NeoX, Llama,
    Mistral, Bloom or MPT.

    Args:
        folder: with config.json and the weights.
        output: save folder to write; `load_checkpoint(output)` and the key `load` of a run read it.

    Returns:
        `.checkpoint` (the folder), `.config` (the `ModelConfig`), `.notes`.

    Raises:
        ExportError: not such a folder, or weights that do not fit it.
    """
    return import_folder(folder, output)
