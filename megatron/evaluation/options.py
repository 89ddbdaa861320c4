"""What an evaluation is told, as plain values; nothing here needs lm-eval or torch, so a slip in a command shows at once."""

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


SCOPES = ("context", "whole")


@dataclass(frozen=True)
class Prefix:
    """How a prefix model is given its text; `length` 0 is a model without prefix layers.

    Such a model reads the first `length` tokens in both directions. When a given continuation is scored, that can be

        context  the prompt alone: the continuation is predicted without being seen, as in generation
        whole    the first tokens of prompt and continuation together, filled up to the length: what the released JRT harness
                 does, and what `lm_eval --model hf` does with any prefix model. Each token of the continuation is then among
                 the keys of its own prediction.

    mode: plain | left_pad | read_twice, how a shorter text is filled, see `generation/prompts.py`. filler: what left_pad puts
    in front, GPT-2's space.
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
                hint="prompt_mode: plain (models without jrt layers read a prompt as it is)",
            )


@dataclass(frozen=True)
class HarnessOptions:
    """max_length: tokens read at most. batch_size: rows per pass. max_gen_toks: new tokens where a task does not say.

    prefix: for prefix (JRT) models. stop_at_eod: False generates on past an end of document, as the released Based and JRT
    harnesses do. seed: of sampled generation.
    """

    max_length: int
    batch_size: int = 8
    max_gen_toks: int = 256
    prefix: Prefix = field(default_factory=Prefix)
    stop_at_eod: bool = True
    seed: int = 1234


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    tasks: names, or `GROUPS`. limit: examples per task. num_fewshot: None as the task says. data_dir: local datasets.
    metadata: settings of tasks (`context_length`, `tokenizer` ... of the recall tasks). bootstrap_iters: for errors that
    have no formula.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    data_dir: Path | None = None
    metadata: Mapping[str, Any] | None = None
    bootstrap_iters: int = 1000

    @property
    def names(self) -> list[str]:
        """Task names with groups spelled out, each once."""
        found = [name for task in self.tasks for name in GROUPS.get(task, (task,))]
        return list(dict.fromkeys(found))
