"""The model interface of lm-eval (0.4.13): an `LM` with `loglikelihood`, `loglikelihood_rolling` and `generate_until`.

Tokenisation of pairs, truncation, windows, stop strings and postprocessing of generated text follow lm-eval's `hf` model, so
that a checkpoint and its exported folder get the same scores. Batching is ours (`batching.py`). With several
replicas lm-eval distributes the documents: each leading process is one of its ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from megatron.data.tokenizers import Tokenizer
from megatron.errors import ConfigError
from megatron.evaluation.batching import prompt_rows, score_batches, score_row, score_tensors, share_rows
from megatron.evaluation.forward import Forward, ForwardBatch
from megatron.evaluation.options import HarnessOptions
from megatron.generation.sample import Sampling, decode

_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "use_cache"}


class HarnessLM(TemplateLM):
    """A `Forward` with its tokenizer; exists on leading ranks only."""

    def __init__(self, forward: Forward, tokens: Tokenizer, options: HarnessOptions) -> None:
        super().__init__()
        self.forward, self.tokens, self.options = forward, tokens, options
        self._device = forward.device
        self._rank, self._world_size = forward.mesh.dp_rank, forward.mesh.dp

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-document token."""
        return self.tokens.eod

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without a context."""
        return self.eot_token_id if self.tokens.bos is None else self.tokens.bos

    @property
    def max_length(self) -> int:
        """Maximum number of input tokens."""
        return self.options.max_length

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's request cache."""
        return f"{self.tokens.name}-{self.tokens.fingerprint()[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text after the template's first tokens, unless the text already starts with them or the argument is False.

        The template's last tokens are never added: they would separate a context from its continuation.
        """
        template = self.tokens.template
        if add_special_tokens is None and template.before:
            add_special_tokens = not string.startswith(self.tokens.detokenize([self.prefix_token_id]))
        return self.tokens.tokenize_piece(string) if add_special_tokens is False else self.tokens.tokenize_prompt(string)

    def tok_decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without end-of-document, padding and template tokens."""
        template = self.tokens.template
        special = {self.tokens.eod, self.tokens.pad, *template.before, *template.after}
        return self.tokens.detokenize([i for i in ids if i not in special])

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, is greedy) of each (pair of texts or None, context ids, continuation ids), in order."""
        options = self.options
        rows = [score_row(context, continuation, options.max_length, options.prefix) for _, context, continuation in requests]
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), desc="scoring", disable=quiet) as bar:
            for batch in score_batches(share_rows(rows), options.batch_size):
                passed, places, targets = score_tensors(batch)
                values, likeliest = self.forward.score(passed, places, targets)
                at = 0
                for number, _, continuation in (span for row in batch for span in row.spans):
                    span = slice(at, at + len(continuation))
                    scores[number] = (float(values[span].sum()), bool(likeliest[span].all()))
                    at += len(continuation)
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], scores[number])
                    bar.update()
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of complete texts, in windows of `max_length` with minimal overlap."""
        all_windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            disjoint = [(None, *make_disjoint_window(window)) for window in windows]
            all_windows += disjoint
            counts.append(len(disjoint))
        values = iter(self._loglikelihood_tokens(all_windows, disable_tqdm))
        totals = [sum((next(values)[0] for _ in range(count)), 0.0) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to its first stop string, end of document or `max_gen_toks`."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts_by_request = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        quiet = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), desc="generating", disable=quiet) as bar:
            for numbers in groups.values():
                plan = self._plan(requests[numbers[0]].args[1])
                numbers.sort(key=lambda n: -len(prompts[n]))
                for start in range(0, len(numbers), self.options.batch_size):
                    batch = numbers[start : start + self.options.batch_size]
                    texts = self._generate([prompts[n] for n in batch], plan, batch[0])
                    for number, text in zip(batch, texts, strict=True):
                        texts_by_request[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return texts_by_request

    def _plan(self, task_arguments: dict[str, Any]) -> _Plan:
        """Parse a task's generation arguments."""
        arguments = dict(normalize_gen_kwargs(task_arguments, self.options.max_gen_toks))
        unknown = sorted(set(arguments) - _KNOWN)
        if unknown:
            raise ConfigError(
                f"generation argument '{unknown[0]}' is not supported", hint=f"known: {', '.join(sorted(_KNOWN))}"
            )
        count, sampled = arguments["max_gen_toks"], bool(arguments.get("do_sample"))
        if count >= self.max_length:
            raise ConfigError(f"{count} new tokens leave no room for a prompt within {self.max_length}", hint="eval_max_length")
        until = [text for text in handle_stop_sequences(arguments["until"], eos=None) if text]
        sampling = Sampling(
            temperature=float(arguments.get("temperature") or 0.0) if sampled else 0.0,
            top_k=int(arguments.get("top_k") or 0) if sampled else 0,
            top_p=float(arguments.get("top_p") or 0.0) if sampled else 0.0,
            maximum_tokens=count,
            seed=self.options.seed,
        )
        return _Plan(until, count, sampling)

    def _generate(self, prompts: Sequence[Sequence[int]], plan: _Plan, first: int) -> list[str]:
        """Continue a batch; `first` numbers its seeds."""
        max_prompt = self.max_length - plan.count
        truncated = [list(prompt)[-max_prompt:] or [self.prefix_token_id] for prompt in prompts]
        new: list[list[int]] = [[] for _ in truncated]

        def accept(row: int, token: int, _: Tensor) -> bool:
            new[row].append(token)
            return self._continues(new[row], plan)

        batch = _Prompts(self.forward, prompt_rows(truncated, self.options.prefix))
        decode(batch, plan.sampling, first, [True] * len(truncated), accept)
        return [postprocess_generated_text(self.tok_decode(row), plan.until, None) for row in new]

    def _continues(self, generated: Sequence[int], plan: _Plan) -> bool:
        if len(generated) >= plan.count or (self.options.stop_at_eod and generated[-1] == self.tokens.eod):
            return False
        text = self.tok_decode(generated)
        return not any(stop in text for stop in plan.until)

    # collectives of lm-eval's ranks (our replicas)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """One entry per replica."""
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(tensors, tensor, group=self.forward.mesh.dp_group)
        return torch.stack(tensors) if tensor.dim() == 0 else torch.cat(tensors)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Every replica's object on replica `dst`, None on the others."""
        gathered: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, group=self.forward.mesh.dp_group, group_dst=dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all replicas."""
        dist.barrier(group=self.forward.mesh.dp_group)


@dataclass(frozen=True)
class _Prompts:
    """A batch of prompts for a model over a mesh, with the methods that `generation/sample.py` decodes with."""

    forward: Forward
    rows: ForwardBatch

    def prefill(self) -> Tensor:
        """Logits [b, n] after the prompts."""
        return self.forward.prefill(self.rows)

    def advance(self, tokens: Tensor) -> Tensor:
        """Logits [b, n] after one more token [b] per row."""
        return self.forward.advance(tokens)


@dataclass(frozen=True)
class _Plan:
    """Generation settings of a task.

    Attributes:
        until: stop strings.
        count: maximum number of new tokens.
        sampling: sampling parameters.
    """

    until: list[str]
    count: int
    sampling: Sampling
