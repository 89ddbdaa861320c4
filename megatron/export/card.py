"""The model card of an exported folder (README.md), generated from metadata in the checkpoint.

What only a person can know (license, languages, datasets on the Hub) comes from `CardInfo`; missing entries stay missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # re-exported, not marked as such

from megatron.checkpoint.manifest import Manifest
from megatron.data.hub import PREFIX, parse
from megatron.errors import DataError, ExportError
from megatron.export.card_facts import LossRow, citation, limits, loss_table, run_rows
from megatron.export.card_use import how_to_use
from megatron.export.scores import Score
from megatron.interop.tested_versions import PROVED_TRANSFORMERS
from megatron.model.config import ModelConfig
from megatron.registry import layer_info

_LINEAR = ("metala", "based", "jrt")
_FIXED = (*_LINEAR, "mamba", "base_conv", "sliding")
_GROWING = "softmax"
"""Module names of mixers: linear attention, those with a state of fixed size, and the one with a growing key/value cache."""


@dataclass(frozen=True)
class CardInfo:
    """What the user states for the card.

    Attributes:
        license: identifier of the Hub, such as `apache-2.0`; `other` needs license_name.
        license_name: name of a license without an identifier.
        license_link: URL of that license.
        languages: codes such as `en`.
        datasets: names on the Hub, in addition to those in the checkpoint.
        scores: evaluation results.
        metrics: `metrics.jsonl` of the run; None: the file next to the folder of checkpoints, if there is one.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    metrics: Path | None = None

    def check(self) -> None:
        """Check the values.

        Raises:
            ExportError: the Hub would refuse a value or show it wrongly.
        """
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ExportError(
                f"'{self.license}' is not a license identifier",
                hint="apache-2.0, mit, cc-by-4.0, ... or other with --license-name",
            )
        if (self.license == "other") != (self.license_name is not None) or (self.license_link and not self.license_name):
            raise ExportError(
                "the license is incomplete", hint="--license other --license-name NAME [--license-link URL], or an ID"
            )
        for language in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
                raise ExportError(f"'{language}' is not a language code", hint="two or three letters (en), code, multilingual")
        for name in self.datasets:
            if not _hub_name(name):
                raise ExportError(f"'{name}' is not the name of a dataset on the Hub", hint="OWNER/NAME")


@dataclass(frozen=True)
class ExportedModel:
    """The exported model, for its card.

    Attributes:
        title: name of the model.
        config: its shape.
        parameters: number of parameters.
        manifest: manifest of the checkpoint.
        dtype: dtype of the weights.
        notes: notes of the export.
        tokenizer: the folder holds a tokenizer.
        native: transformers' own classes load the folder, which holds no code.
        course: losses of the run, from its metrics.
    """

    title: str
    config: ModelConfig
    parameters: int
    manifest: Manifest
    dtype: str
    notes: Sequence[str]
    tokenizer: bool
    native: bool
    course: tuple[LossRow, ...] = ()


def _hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {_cell(k)} | {_cell(v)} |" for k, v in values.items() if v not in (None, "", {}))


def _number(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value


def _listed(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def _file_of(kind: str) -> str:
    return layer_info(kind).module.rpartition(".")[2]


def _shape(config: ModelConfig, parameters: int, dtype: str) -> dict[str, Any]:
    kinds = {kind: config.layer_types.count(kind) for kind in dict.fromkeys(config.layer_types)}
    return {
        "parameters": f"{parameters:,}",
        "layers": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        "hidden size": config.hidden_size,
        "heads": config.num_heads,
        "MLP": f"{config.mlp}, width {config.mlp_width}, {config.activation}",
        "norm": config.norm,
        "vocabulary": f"{config.vocab_size:,}",
        "output projection": "tied to the embedding" if config.tie_embeddings else "untied",
        "dtype of the weights": dtype,
    }


def _training(manifest: Manifest) -> dict[str, Any]:
    state, facts = manifest.state, manifest.facts
    rows: dict[str, Any] = {
        "optimizer steps": _number(manifest.iteration),
        "tokens": _number(state.get("consumed_tokens")),
        "samples": _number(state.get("consumed_samples")),
        "sequence length": _number(facts.get("seq_length")),
        "data": _listed(facts.get("data")),
        "imported from": facts.get("imported_from"),
    }
    return rows | dict(facts.get("run") or {}) | run_rows(manifest)


def _has_fixed_state(config: ModelConfig) -> bool:
    """Whether no layer keeps keys and values of all tokens."""
    return all(_file_of(kind) in _FIXED for kind in config.layer_types)


def _kind_of_model(config: ModelConfig) -> str:
    """The first sentence: the kind of state that generation keeps, for our own mixers."""
    files = [_file_of(kind) for kind in config.layer_types]
    growing = sum(file == _GROWING for file in files)
    if _has_fixed_state(config):
        return "A language model with a recurrent state of fixed size"
    if growing == len(files):
        return "A language model with softmax attention"
    if growing and all(file in (*_FIXED, _GROWING) for file in files):
        return f"A hybrid language model: {growing} of its {len(files)} layers keep keys and values, the others a fixed state"
    return "A language model"


def _datasets(subject: ExportedModel, stated: CardInfo) -> list[str]:
    """Names on the Hub: those of `hf:` sources in the checkpoint's metadata, and the stated ones."""
    data = subject.manifest.facts.get("data") or ()
    names = []
    for entry in [data] if isinstance(data, str) else data:
        if str(entry).startswith(PREFIX):
            try:
                names.append(parse(str(entry))[0])
            except DataError:
                continue
    return list(dict.fromkeys([*filter(_hub_name, names), *stated.datasets]))


def front_matter(subject: ExportedModel, stated: CardInfo) -> ModelCardData:
    """The metadata that the Hub reads."""
    kinds = list(dict.fromkeys(subject.config.layer_types))
    finite = [score for score in stated.scores if math.isfinite(score.value)]  # the Hub rejects infinity
    linear = ["linear-attention"] if any(_file_of(kind) in _LINEAR for kind in kinds) else []
    return ModelCardData(
        license=stated.license,
        license_name=stated.license_name,
        license_link=stated.license_link,
        language=list(stated.languages) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["linear-neox", "pretraining", *linear, *(kind.replace("_", "-") for kind in kinds)],
        datasets=_datasets(subject, stated) or None,
        model_name=" ".join(subject.title.split()) if finite else None,
        eval_results=[score.metadata() for score in finite] or None,
    )


def _evaluation(scores: Sequence[Score]) -> str:
    if not scores:
        return "No results were given at export."
    lines = ["| task | metric | value | standard error | settings | measured by |", "|---|---|---:|---:|---|---|"]
    lines += [f"| {' | '.join(map(_cell, score.row()))} |" for score in scores]
    return "\n".join(lines)


def _license(stated: CardInfo) -> str:
    if stated.license is None:
        return "Not stated."
    name = stated.license_name or stated.license
    return f"[{name}]({stated.license_link})" if stated.license_link else f"`{name}`"


def _prefix(config: ModelConfig) -> int:
    """Number of tokens that prefix layers read in both directions; 0 without such layers."""
    if not any(_file_of(kind) == "jrt" for kind in config.layer_types):
        return 0
    return int(config.layer_options.get("jrt", {}).get("prefix_length", 0))


def model_card(subject: ExportedModel, stated: CardInfo) -> str:
    """The text of README.md.

    Args:
        subject: the exported model.
        stated: what the user stated.

    Returns:
        Markdown with a YAML front matter.
    """
    notes = "\n".join(f"* {note}" for note in subject.notes)
    lowest, newest = PROVED_TRANSFORMERS
    return f"""---
{front_matter(subject, stated).to_yaml()}
---

# {_cell(subject.title)}

{_kind_of_model(subject.config)}, exported from the checkpoint of step {subject.manifest.iteration:,}.

{how_to_use(subject.tokenizer, subject.native, _prefix(subject.config))}
## Versions

Folders of this kind were tested with `transformers` {lowest} to {newest}; this one was compared with its checkpoint under
{transformers.__version__}.{"" if subject.native else " Outside the range it says so in one line when it is loaded."}

## Model

| | |
|---|---|
{_rows(_shape(subject.config, subject.parameters, subject.dtype))}

## Training

| | |
|---|---|
{_rows(_training(subject.manifest))}

### Loss

{loss_table(subject.course)}

## Evaluation

{_evaluation(stated.scores)}

## Limits

{limits(subject.manifest, _has_fixed_state(subject.config), stated.languages)}

## License

{_license(stated)}

## Citation

{citation(subject.config)}

## Export

{notes}
"""
