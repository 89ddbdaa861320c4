"""What an evaluation is told, as plain values; nothing here needs lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.evaluation.batching import Prefix

STANDARD = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "lambada_openai")
SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc")
RECALL = ("based_fda", "based_swde", "based_nq_1024", "based_squad", "based_triviaqa", "based_drop")
GROUPS = {
    "standard": STANDARD,
    "superglue": SUPERGLUE,
    "recall": RECALL,
    "recall_twice": tuple(f"{name}_twice" for name in RECALL),
}


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

    tasks: names, or `GROUPS`. limit: examples per task. num_fewshot: None as the task says. data_dir: local data sets.
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
