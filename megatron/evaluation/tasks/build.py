"""From a recall dataset to the documents and scores of an lm-eval task; the task files beside this one name what is here.

Settings come as lm-eval's metadata: `recall` and `form` from the task file; `context_length`, `answer_length` and `tokenizer`
from the person (`--metadata` of the `lm_eval` command, `eval_context_length` of ours). The document's budget is
`context_length - answer_length` tokens; a context_length of 0 cuts nothing.
"""

from __future__ import annotations

import json
import logging
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets

from megatron.errors import ConfigError, DataError
from megatron.evaluation.tasks.prompts import PROMPTS, SWDE_CUE, Record
from megatron.evaluation.tasks.shorten import Tokens, cut_text

_log = logging.getLogger(__name__)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Source:
    """A dataset of the hub. document: the field that is cut. anchors: the fields that the cut keeps in sight."""

    path: str
    name: str | None
    document: str
    anchors: tuple[str, ...]


SOURCES = {
    "swde": Source("hazyresearch/based-swde-v2", "default", "text", ("key", "value")),
    "fda": Source("hazyresearch/based-fda", "default", "text", ("key", "value")),
    "squad": Source("hazyresearch/based-squad", "default", "text", ("value",)),
    "triviaqa": Source("hazyresearch/based_triviaqa", None, "context", ()),
    "drop": Source("hazyresearch/based_drop", None, "context", ()),
    "nq_512": Source("hazyresearch/based_nq_512", None, "context", ("answers",)),
    "nq_1024": Source("hazyresearch/based_nq_1024", None, "context", ("answers",)),
    "nq_2048": Source("hazyresearch/based_nq_2048", None, "context", ("answers",)),
}


@dataclass
class Counts:
    """What became of the records: how many were read, left out, lost their anchor (not found), or were shortened."""

    records: int = 0
    dropped: int = 0
    anchor_missing: int = 0
    shortened: int = 0


def answers_of(record: Record) -> list[str]:
    """The gold strings."""
    return list(record["answers"]) if "answers" in record else [record["value"]]


def examples(
    records: Iterable[Record], recall: str, form: str, tokens: Tokens | None, budget: int
) -> tuple[list[dict[str, Any]], Counts]:
    """The task's documents (`prompt`, `answers`) and what was left out; without a budget nothing is cut."""
    source, prompt = SOURCES[recall], PROMPTS[recall.split("_")[0], form]
    counts, made = Counts(), []
    for record in records:
        counts.records += 1
        gold = answers_of(record)
        changed = dict(record)
        if form == "stripped":
            gold = [text.strip() for text in gold]
        elif form != "verbatim":
            if recall == "swde":
                changed["text"] = changed["text"].split(SWDE_CUE)[0]
            if tokens is not None and budget:
                piece = _piece(changed, source, tokens, budget)
                if piece is None:
                    counts.dropped += 1
                    continue
                counts.anchor_missing += not piece.found
                counts.shortened += piece.kept < piece.tokens
                changed[source.document] = piece.text
        made.append({"prompt": prompt(changed), "answers": gold})
    return made, counts


def _piece(record: Mapping[str, Any], source: Source, tokens: Tokens, budget: int) -> Any:
    anchors = [record[field] for field in source.anchors]
    first = [(value[0] if value else "") if isinstance(value, list) else value for value in anchors]
    others = record.get("alt_answers") or ()
    return cut_text(record[source.document], first, tokens, budget, others, record.get("tok_pos"))


def documents(
    recall: str,
    form: str,
    context_length: int = 1000,
    answer_length: int = 50,
    tokenizer: str | Tokens | None = None,
    pretrained: str | None = None,
    **others: Any,
) -> dict[str, datasets.Dataset]:
    """The validation split of a recall task, as lm-eval's `custom_dataset` gives it; counts are in its description.

    Args:
        tokenizer: what tokens are counted with; a folder or hub id, else that of `pretrained`, else `gpt2`.
    """
    source = SOURCES[recall]
    context, answer = int(context_length), int(answer_length)
    if context and context <= answer:
        raise ConfigError(f"a context_length of {context} leaves nothing beside the {answer} tokens of the answer")
    tokens = None
    if context and form in ("default", "twice"):
        tokens = tokenizer if isinstance(tokenizer, Tokens) else _tokens(tokenizer or pretrained or "gpt2")
    made, counts = examples(records_of(source), recall, form, tokens, max(0, context - answer))
    if not made:
        raise DataError(f"no example of {recall} is left", why=str(asdict(counts)))
    _log.info("%s (%s): %s", recall, form, asdict(counts))
    found = datasets.Dataset.from_list(made)
    found.info.description = json.dumps(asdict(counts))
    return {"validation": found}


def records_of(source: Source) -> datasets.Dataset:
    """The dataset from the hub, or from the folder of its name below the working directory (`--data-dir`)."""
    return datasets.load_dataset(source.path, source.name, split="validation")


def _tokens(name: str) -> Tokens:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(name)
    return Tokens(
        lambda text: loaded.encode(text, add_special_tokens=False),
        lambda ids: str(loaded.decode(list(ids), skip_special_tokens=True)),
    )


def contains(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where any gold string occurs in the generated line, whatever its case."""
    return {"contains": _contains(results[0], doc["answers"])}


def contains_and_f1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`contains`, and SQuAD's exact match and F1 (fractions), which JRT also reports for SQuAD and TriviaQA.

    JRT hands SQuAD 2's metric the probability of "unanswerable" too; at that metric's threshold of 1 it changes nothing.
    """
    golds = [words for answer in doc["answers"] if (words := _words(answer))] or [[]]
    said = _words(results[0])
    exact = max(float(said == gold) for gold in golds)
    return {"contains": _contains(results[0], doc["answers"]), "exact": exact, "f1": max(_f1(said, gold) for gold in golds)}


def _contains(said: str, golds: Sequence[str]) -> float:
    return float(any(re.search(re.escape(gold), said, re.IGNORECASE) for gold in golds))


def _words(text: str) -> list[str]:
    """SQuAD's normalised words: lower case, no punctuation, no articles."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def _f1(said: Sequence[str], gold: Sequence[str]) -> float:
    if not said or not gold:
        return float(list(said) == list(gold))
    common = sum((Counter(said) & Counter(gold)).values())
    return 2 * common / (len(said) + len(gold))
