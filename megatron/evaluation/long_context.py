"""The long-context measures of one model: needles over length and depth, and the loss over the position in long documents.

`eval.py` runs them for a checkpoint, `tools/long_context.py` for several models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from megatron.data.tokenizer_base import Tokenizer
from megatron.evaluation import long_documents
from megatron.evaluation.chunked import ChunkedPrompts
from megatron.evaluation.haystack import TextHaystack
from megatron.evaluation.ladder import Plan, climb, summary, table
from megatron.evaluation.needle_sources import expanded, reads_text, source_of
from megatron.model.lm import LanguageModel

Documents = Callable[[], tuple[Iterator[NDArray[Any]], str]]
"""Opens the documents of a run, and their place for messages."""


def measure_needles(
    model: LanguageModel,
    tokenizer: Tokenizer,
    names: Sequence[str],
    plan: Plan,
    documents: Documents,
    *,
    spec: Mapping[str, Any] | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """The ladders of these needle words as a JSON object; prints a table of each.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        names: see `options.NEEDLES`.
        plan: lengths, depths and examples.
        documents: text for haystacks, opened only for kinds that need it.
        spec: `synthetic` of the run, for the words `needle` and `needle_text`.
        backend: see `Context`.

    Raises:
        ConfigError: a kind needs a text or a training task that the run does not have.
        DataError: no prompt can be made.
    """
    kinds, text = expanded(names), None
    if any(reads_text(name) for name in kinds):
        text = TextHaystack.of(*documents(), tokenizer)
    sources = [source_of(name, tokenizer, text, spec) for name in kinds]
    read = partial(ChunkedPrompts, model, vocab_size=tokenizer.vocab_size, backend=backend)
    rows: list[dict[str, Any]] = []
    for source in sources:
        mine = list(climb(source, read, tokenizer, plan))
        print(table(mine), flush=True)
        rows += mine
    facts = {"haystack": text and text.where, "seed": plan.seed, "examples_per_cell": plan.examples}
    return {**facts, "scores": summary(rows), "rows": rows}


def measure_by_length(
    model: LanguageModel,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    documents: Documents,
    *,
    limit: int | None = None,
    backend: str = "auto",
) -> dict[str, Any]:
    """The loss over the position in documents of at least `max(lengths)` tokens as a JSON object; prints a table.

    Raises:
        ConfigError: the model cannot read documents of this length.
        DataError: no document is long enough.
    """
    stream, where = documents()
    selected = long_documents.select(stream, max(lengths), where, limit or long_documents.DOCUMENT_LIMIT)
    options: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "backend": backend}
    result = long_documents.measure(model, selected, sorted(lengths), tokenizer.eod, **options)
    print(long_documents.table(result), flush=True)
    return result
