"""The model card of an exported folder (README.md), made of facts that stand in the checkpoint, not of claims.

What only a person can know (license, languages, datasets on the hub) is given as `Stated`; what is not given is not made up.
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
from megatron.export.card_use import how_to_use
from megatron.export.scores import Score
from megatron.interop.tested_versions import PROVED_TRANSFORMERS
from megatron.model.config import ModelConfig
from megatron.registry import layer_info

_LINEAR = ("metala", "based", "jrt")
_FIXED = (*_LINEAR, "mamba", "base_conv", "sliding")
_GROWING = "softmax"
"""File names of mixers: linear attention, those whose state has a fixed size, and the one that keeps all keys and values."""


@dataclass(frozen=True)
class Stated:
    """What a person says for the card.

    license: identifier of the hub, such as `apache-2.0`; `other` needs license_name, and may have license_link.
    languages: codes such as `en`. datasets: names on the hub, besides those that the checkpoint itself names.
    scores: measured figures.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()

    def check(self) -> None:
        """Raises:
        ExportError: what the hub would refuse, or show wrongly.
        """
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ExportError(
                f"'{self.license}' is no license identifier",
                hint="apache-2.0, mit, cc-by-4.0, ... or other with --license-name",
            )
        if (self.license == "other") != (self.license_name is not None) or (self.license_link and not self.license_name):
            raise ExportError(
                "the license is not said completely", hint="--license other --license-name NAME [--license-link URL], or an ID"
            )
        for language in self.languages:
            if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
                raise ExportError(f"'{language}' is no language code", hint="two or three letters (en), code or multilingual")
        for name in self.datasets:
            if not _hub_name(name):
                raise ExportError(f"'{name}' is no name of a dataset on the hub", hint="OWNER/NAME")


@dataclass(frozen=True)
class Subject:
    """The exported model: what stands in the checkpoint and what the export found out.

    parameters: their number. dtype: of the weights. notes: lines of the export. tokenizer: whether the folder holds one.
    native: whether transformers' own classes load it, without code in the folder.
    """

    title: str
    config: ModelConfig
    parameters: int
    manifest: Manifest
    dtype: str
    notes: Sequence[str]
    tokenizer: bool
    native: bool


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
        "output projection": "tied to the embedding" if config.tie_embeddings else "its own",
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
    return rows | dict(facts.get("run") or {})


def _kind_of_model(config: ModelConfig) -> str:
    """The first sentence: what generation keeps, as far as the mixers of ours say it."""
    files = [_file_of(kind) for kind in config.layer_types]
    growing = sum(file == _GROWING for file in files)
    if all(file in _FIXED for file in files):
        return "A language model with a recurrent state of fixed size"
    if growing == len(files):
        return "A language model with softmax attention"
    if growing and all(file in (*_FIXED, _GROWING) for file in files):
        return f"A hybrid language model: {growing} of its {len(files)} layers keep keys and values, the others a fixed state"
    return "A language model"


def _datasets(subject: Subject, stated: Stated) -> list[str]:
    """Names on the hub: those of `hf:` sources in the checkpoint's facts, and the stated ones."""
    data = subject.manifest.facts.get("data") or ()
    names = []
    for entry in [data] if isinstance(data, str) else data:
        if str(entry).startswith(PREFIX):
            try:
                names.append(parse(str(entry))[0])
            except DataError:
                continue
    return list(dict.fromkeys([*filter(_hub_name, names), *stated.datasets]))


def front_matter(subject: Subject, stated: Stated) -> ModelCardData:
    """The metadata that the hub reads."""
    kinds = list(dict.fromkeys(subject.config.layer_types))
    finite = [score for score in stated.scores if math.isfinite(score.value)]  # the hub reads no infinity
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


def _license(stated: Stated) -> str:
    if stated.license is None:
        return "Not stated."
    name = stated.license_name or stated.license
    return f"[{name}]({stated.license_link})" if stated.license_link else f"`{name}`"


def _prefix(config: ModelConfig) -> int:
    """Tokens that prefix layers of the model read in both directions; 0 without such layers."""
    if not any(_file_of(kind) == "jrt" for kind in config.layer_types):
        return 0
    return int(config.layer_options.get("jrt", {}).get("prefix_length", 0))


def model_card(subject: Subject, stated: Stated) -> str:
    """The text of README.md.

    Args:
        subject: facts of the checkpoint and of the export.
        stated: what a person added.

    Returns:
        Markdown behind a YAML front matter.
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

Folders of this kind were proved with `transformers` {lowest} to {newest}; this one was compared with its checkpoint under
{transformers.__version__}.{"" if subject.native else " Outside the range it says so in one line when it is loaded."}

## Model

| | |
|---|---|
{_rows(_shape(subject.config, subject.parameters, subject.dtype))}

## Training

| | |
|---|---|
{_rows(_training(subject.manifest))}

## Evaluation

{_evaluation(stated.scores)}

## License

{_license(stated)}

## Export

{notes}
"""
