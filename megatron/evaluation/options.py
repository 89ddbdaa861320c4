"""Options of an evaluation; imports neither lm-eval nor torch, so a mistake in a command is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError

STANDARD = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "lambada_openai")
SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc")
RECALL = ("based_fda", "based_swde", "based_nq_1024", "based_squad", "based_triviaqa", "based_drop")
GROUPS = {
    "standard": STANDARD,
    "superglue": SUPERGLUE,
    "recall": RECALL,
    "recall_twice": tuple(f"{name}_twice" for name in RECALL),
}
NIAH = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
)
NEEDLE_GROUPS = {"niah": NIAH}
NEEDLES = (*NIAH, *NEEDLE_GROUPS, "needle", "needle_text")
"""Words of the needle ladder: RULER's kinds, all of them, and the synthetic training tasks."""

SCOPES = ("context", "whole")


@dataclass(frozen=True)
class Prefix:
    """The prefix of a prefix model, which reads the first `length` tokens in both directions.

    The prefix of a scored continuation is

        context  the prompt alone: the continuation is predicted without being seen, as in generation
        whole    the first tokens of prompt and continuation together, filled up to the length, as in the released JRT harness
                 and in `lm_eval --model hf` with any prefix model. Each token of the continuation is then among
                 the keys of its own prediction.

    Attributes:
        length: prefix length in tokens; 0 for a model without prefix layers.
        mode: plain | left_pad | read_twice: how a shorter text is filled, see `generation/prompts.py`.
        scope: context | whole.
        filler: id that left_pad puts before the prompt, GPT-2's space.
    """

    length: int = 0
    mode: str = "plain"
    scope: str = "context"
    filler: int = 220

    def __post_init__(self) -> None:
        from megatron.generation.prompts import MODES

        if self.mode not in MODES or self.scope not in SCOPES:
            raise ConfigError(f"unknown prompt mode '{self.mode}' or prefix scope '{self.scope}'", hint=f"{MODES}, {SCOPES}")
        if self.mode != "plain" and not self.length:
            raise ConfigError(
                f"prompt_mode '{self.mode}' fills a prefix, and this model has none",
                hint="prompt_mode: plain for models without jrt layers",
            )


@dataclass(frozen=True)
class HarnessOptions:
    """Options of `HarnessLM`.

    Attributes:
        max_length: maximum number of input tokens.
        batch_size: rows per pass.
        max_gen_toks: maximum number of new tokens, for tasks without a limit.
        prefix: prefix of prefix (JRT) models.
        stop_at_eod: stop at an end of document; False as in the released Based and JRT harnesses.
        seed: seed of sampled generation.
    """

    max_length: int
    batch_size: int = 8
    max_gen_toks: int = 256
    prefix: Prefix = field(default_factory=Prefix)
    stop_at_eod: bool = True
    seed: int = 1234


@dataclass(frozen=True)
class Request:
    """The tasks to evaluate.

    Attributes:
        tasks: names of tasks or `GROUPS`.
        limit: maximum number of examples per task.
        num_fewshot: few-shot examples; None: the task's default.
        data_dir: folder of local datasets.
        metadata: settings of tasks (`context_length`, `tokenizer`, ... of the recall tasks).
        bootstrap_iters: bootstrap iterations for standard errors without a formula.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    data_dir: Path | None = None
    metadata: Mapping[str, Any] | None = None
    bootstrap_iters: int = 1000

    @property
    def names(self) -> list[str]:
        """Task names with groups expanded, without duplicates."""
        expanded = [name for task in self.tasks for name in GROUPS.get(task, (task,))]
        return list(dict.fromkeys(expanded))
