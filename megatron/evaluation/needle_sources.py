"""Where the prompts of the needle words come from: RULER's kinds, and the training tasks `needle` and `needle_text`.

A model that was trained on one of the synthetic tasks (`synthetics/needle.py`) is asked for needles of the very same form, at
any length and depth; all other models get RULER's kinds (`niah.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import ConfigError
from megatron.evaluation.haystack import Haystack
from megatron.evaluation.niah import CHOICES, KINDS, Case, CaseSource, NiahSource, draw_distinct
from megatron.evaluation.options import NEEDLE_GROUPS
from megatron.synthetics.dataset import SPLITS, task_kind
from megatron.synthetics.needle import NeedleNumbers, NeedleText
from megatron.synthetics.task import checked

SYNTHETIC = {kind.name: kind for kind in (NeedleNumbers, NeedleText)}


def expanded(names: Sequence[str]) -> list[str]:
    """Needle words with groups expanded, without duplicates."""
    return list(dict.fromkeys(kind for name in names for kind in NEEDLE_GROUPS.get(name, (name,))))


class SyntheticSource(CaseSource):
    """Prompts of a synthetic training task; the answer must be generated token by token.

    Args:
        name: needle | needle_text.
        spec: `synthetic` of the run; its parameters hold for all lengths, those of its first validation slice included.
        tokenizer: of the model.

    Raises:
        ConfigError: the run has another task.
    """

    def __init__(self, name: str, spec: Mapping[str, Any] | None, tokenizer: Tokenizer) -> None:
        self.name, self._tokenizer = name, tokenizer
        if spec is None or spec.get("task") != name:
            raise ConfigError(
                f"'{name}' asks for the needles of a training task",
                why="the configuration's synthetic task is " + str((spec or {}).get("task", "not set")),
                hint=f"a run with synthetic: {{task: {name}}}, or --eval_tasks {next(iter(KINDS))}",
            )
        slices = spec.get("valid") or spec.get("test") or spec.get("train") or [{}]
        values = {**{k: v for k, v in spec.items() if k not in ("task", *SPLITS)}, **slices[0]}
        self._values = {key: value for key, value in values.items() if key not in ("length", "examples", "depth")}
        self._bound = {"tokenizer": tokenizer} if task_kind(name).reads_text else {}

    def case(self, rng: np.random.Generator, length: int, depth: float) -> Case:
        """See the base class; the last token of the answer is not part of the length."""
        task = checked(task_kind(self.name), {**self._values, "length": length, "depth": float(depth)}, **self._bound)
        examples = task.draw(rng, 1)
        answer_places = np.flatnonzero(examples.labels[0] >= 0)
        answer = tuple(examples.labels[0, answer_places].tolist())
        if isinstance(task, NeedleNumbers):
            wrong = [tuple(ids) for ids in rng.integers(task.first_value, task.rows, (8 * CHOICES, len(answer))).tolist()]
        else:
            numbers = draw_distinct(rng, "numbers", CHOICES, lambda _: False)
            wrong = [tuple(self._tokenizer.tokenize_piece(f" {number}"))[: len(answer)] for number in numbers]
        return Case(
            prompt=examples.inputs[0, : answer_places[0] + 1],
            answer=answer,
            values=(),
            choices=tuple(dict.fromkeys((answer, *wrong)))[:CHOICES],
            depths=(depth,),
            places=(),
            room=len(answer),
        )


def source_of(name: str, tokenizer: Tokenizer, text: Haystack | None, spec: Mapping[str, Any] | None) -> CaseSource:
    """The prompts of a needle word.

    Raises:
        ConfigError: it needs a text or a training task that the run does not have.
        DataError: the tokenizer cannot encode needles.
    """
    if name in SYNTHETIC:
        return SyntheticSource(name, spec, tokenizer)
    return NiahSource(name, tokenizer, text)


def reads_text(name: str) -> bool:
    """Whether the needles of a word are hidden in real text."""
    return name in KINDS and KINDS[name].haystack == "text"
