"""Any checkpoint -> a folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads.

The folder is written under a temporary name, its logits are compared with those of the trainer's model
(`export/verify.py`), and it is renamed only if they agree; otherwise it is removed and an ExportError states the difference.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron.checkpoint.load import read_full_weights
from megatron.checkpoint.manifest import Manifest, read_manifest
from megatron.checkpoint.safetensors_writer import nbytes, write_tensors
from megatron.errors import ExportError
from megatron.export.card import CardInfo, ExportedModel, model_card
from megatron.export.card_facts import loss_course
from megatron.export.pack import PackPlan, pack
from megatron.export.tokenizer import export_tokenizer
from megatron.export.verify import make_probe, verify_folder
from megatron.files import fsync_folder, write_json, write_text
from megatron.generation.load import filled_model, model_config_of
from megatron.interop.hf_classes import Family, family_of
from megatron.interop.hf_models import to_native
from megatron.interop.tested_versions import PROVED_TRANSFORMERS
from megatron.model.config import ModelConfig
from megatron.registry import layer_info

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_REGISTRY = '''"""The token mixers of this model."""

from megatron.layers.base import Layer
{imports}

_MIXERS: dict[str, type[Layer]] = {{
{table}
}}


def layer_class(name: str) -> type[Layer]:
    """The class of the token mixer called `name`."""
    return _MIXERS[name]
'''
"""Replaces `megatron/registry.py` in a packed file."""
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        folder: the exported folder.
        family: its model type.
        parameters: number of parameters.
        difference: largest difference between the folder's and the checkpoint's logits, relative to the largest logit (fp32).
        notes: notes for the user and the model card.
    """

    folder: Path
    family: str
    parameters: int
    difference: float
    notes: tuple[str, ...]


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    max_shard_bytes: int = 5_000_000_000,
    keep_padding: bool = False,
    stated: CardInfo | None = None,
) -> ExportResult:
    """Write the Hugging Face folder `output` from a `global_step<N>` folder of any mesh.

    Args:
        checkpoint: the `global_step<N>` folder.
        output: the folder to write; absent or empty.
        dtype: auto (as stored) | float32 | bfloat16 | float16 | float64.
        max_shard_bytes: weights per file.
        keep_padding: keep the padding rows of the vocabulary; by default the rows beyond the tokenizer's size,
            which no text can reach, are removed and `vocab_size` is the tokenizer's.
        stated: what the user adds to the model card: license, languages, datasets, evaluation results.

    Raises:
        ExportError: `output` exists and is not empty, the dtype is unknown, or the folder's logits differ.
        CheckpointError: the checkpoint is absent or damaged.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    stated = stated or CardInfo()
    stated.check()
    _check_arguments(output, dtype)
    manifest = read_manifest(checkpoint)
    config = model_config_of(manifest, str(checkpoint))
    weights = read_full_weights(checkpoint)
    config, weights, notes = _trim(config, weights, manifest, keep_padding)
    if dtype != "auto":
        weights = {name: t.to(DTYPES[dtype]) for name, t in weights.items()}
    family, why = family_of(config)
    notes.insert(0, why)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        title = str((manifest.facts.get("run") or {}).get("name") or output.name)
        content = _Content(checkpoint, manifest, config, weights, family, title, notes, stated)
        difference = _write(temporary, content, max_shard_bytes)
        if output.is_dir():
            output.rmdir()
        temporary.rename(output)
        fsync_folder(output.parent)
    except OSError as error:
        raise ExportError("the folder cannot be written", where=str(output), why=error.strerror or str(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ExportResult(output, family.name, sum(t.numel() for t in weights.values()), difference, tuple(notes))


def _check_arguments(output: Path, dtype: str) -> None:
    if dtype != "auto" and dtype not in DTYPES:
        raise ExportError(f"unknown dtype '{dtype}'", hint=f"auto, {', '.join(DTYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ExportError("the output exists already", where=str(output), hint="name a new or an empty folder")


def _trim(
    config: ModelConfig, weights: dict[str, Tensor], manifest: Manifest, keep_padding: bool
) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Remove the padding rows of the vocabulary."""
    size = (manifest.facts.get("tokenizer") or {}).get("vocab_size")
    if size is None:
        return config, weights, [f"vocabulary: {config.vocab_size} rows (the checkpoint names no smaller true size)"]
    if keep_padding or size >= config.vocab_size:
        return config, weights, [f"vocabulary: {config.vocab_size} rows, {max(0, config.vocab_size - size)} of them padding"]
    trimmed = {name: t[:size] if name in _VOCABULARY else t for name, t in weights.items()}
    note = f"vocabulary: {size} rows; {config.vocab_size - size} rows that padded the table in training were removed"
    return replace(config, vocab_size=size), trimmed, [note]


@dataclass(frozen=True)
class _Content:
    """The content of an exported folder."""

    checkpoint: Path
    manifest: Manifest
    config: ModelConfig
    weights: dict[str, Tensor]
    family: Family
    title: str
    notes: list[str]
    stated: CardInfo

    @property
    def tokenizer_facts(self) -> Mapping[str, Any]:
        """The manifest's tokenizer metadata, without ids beyond the rows of the embedding.

        Loading a Hugging Face tokenizer without a padding token adds one, whose id may exceed the rows of an imported model.
        """
        facts, rows = dict(self.manifest.facts.get("tokenizer") or {}), self.config.vocab_size
        if facts.get("vocab_size"):
            facts["vocab_size"] = min(facts["vocab_size"], rows)
        ids = ("eod", "pad", "bos")
        return {k: v for k, v in facts.items() if k not in ids or not isinstance(v, int) or v < rows}

    @property
    def dtype(self) -> str:
        """Dtype of the weights; float32 if they are mixed."""
        dtypes = {t.dtype for t in self.weights.values()}
        return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"


def _write(folder: Path, content: _Content, max_shard_bytes: int) -> float:
    """Fill `folder` and verify it; returns the largest logit difference."""
    config, family, weights, notes = content.config, content.family, content.weights, content.notes
    for name, text in packed_sources(config, family).items():
        write_text(folder / name, text)
    renamed = weights if family.native is None else to_native(family.native.layout, config, weights)
    _write_weights(folder, renamed, max_shard_bytes)
    facts, run_facts = content.tokenizer_facts, content.manifest.facts
    length = run_facts.get("max_position_embeddings") or run_facts.get("seq_length")
    write_json(folder / "config.json", _config_json(config, family, facts, content.dtype, length))
    write_json(folder / "generation_config.json", _generation_json(facts))
    notes += export_tokenizer(content.checkpoint / "tokenizer", facts, folder, length)
    model = filled_model(config, weights, dtype=torch.float32, where=str(content.checkpoint))
    probe = make_probe(model, config.vocab_size)
    del model  # free memory before loading the folder's copy
    difference = verify_folder(folder, family.name, family.prefix, probe, family.native is not None)
    notes.append(
        f"logits compared with the checkpoint's in fp32, under transformers {transformers.__version__}: a full pass,"
        f" left-padded rows, steps, `generate` with and without the cache{'' if family.native else ', two documents in a row'};"
        f" largest difference {difference:.1e} of the largest logit"
    )
    total = sum(t.numel() for t in weights.values())
    has_tokenizer = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    native = family.native is not None
    course = loss_course(content.checkpoint, content.stated.metrics, content.manifest.iteration)
    subject = ExportedModel(content.title, config, total, content.manifest, content.dtype, notes, has_tokenizer, native, course)
    write_text(folder / "README.md", model_card(subject, content.stated))
    return difference


def packed_sources(config: ModelConfig, family: Family) -> dict[str, str]:
    """File name -> text of the Python files of an exported folder; `export/pack.py` says what is refused."""
    if family.native is not None:
        return {}
    infos = {name: layer_info(name) for name in dict.fromkeys(config.layer_types)}
    imports = "\n".join(sorted({f"from {info.module} import {info.class_name}" for info in infos.values()}))
    table = "\n".join(f'    "{name}": {info.class_name},' for name, info in infos.items())
    plan = PackPlan(
        entries=((family.shell, f"{family.prefix}Model"), (family.shell, f"{family.prefix}ForCausalLM")),
        title=f"{family.prefix} for transformers: model, mixers and their plain torch operators.",
        replaced={"megatron.registry": _REGISTRY.format(imports=imports, table=table)},
        siblings={family.config: f"configuration_{family.name}"},
    )
    model = pack(plan)
    # transformers caches code by folder name and configuration text: without the digest, two exports of one name would share
    # their modelling code
    digest = hashlib.sha256(model.encode()).hexdigest()[:16]
    title = f"{family.prefix} configuration, for a modelling file of SHA-256 {digest}."
    settings = PackPlan(entries=((family.config, f"{family.prefix}Config"),), title=title)
    return {f"modeling_{family.name}.py": model, f"configuration_{family.name}.py": pack(settings)}


def _write_weights(folder: Path, weights: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Write safetensors; above `max_shard_bytes` as shards with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and nbytes(shards[-1]) + nbytes({name: tensor}) > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0], {"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": nbytes(weights)}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _token_ids(facts: Mapping[str, Any]) -> dict[str, int | None]:
    """Special token ids; all None without a tokenizer."""
    eod = facts.get("eod")
    return {"bos_token_id": facts.get("bos", eod), "eos_token_id": eod, "pad_token_id": facts.get("pad", eod)}


def _config_json(
    config: ModelConfig, family: Family, facts: Mapping[str, Any], dtype: str, length: int | None
) -> dict[str, Any]:
    """config.json, through the family's own class, so that its defaults and ours cannot diverge."""
    fields = family.fields(config)
    if family.native is None:
        if (size := facts.get("vocab_size")) and size < config.vocab_size:
            fields["unpadded_vocab_size"] = size  # rows beyond it are padding that was kept, which a server must not choose
        fields["auto_map"] = family.auto_map
        fields["proved_transformers"] = list(PROVED_TRANSFORMERS)
    elif length:
        fields[family.native.length_key] = length
    settings = family.config_class(**fields, **_token_ids(facts), architectures=[f"{family.prefix}ForCausalLM"], dtype=dtype)
    values = json.loads(settings.to_json_string(use_diff=True))
    return {**values, "tie_word_embeddings": config.tie_embeddings}


def _generation_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**{name: number for name, number in _token_ids(facts).items() if number is not None}, "use_cache": True}
