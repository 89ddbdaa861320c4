"""Loss and perplexity on held-out data.

By default every evaluation reads the same batches: two validations of one run differ by the model only. NeoX continues where
its last validation stopped; `fixed=False` does that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.data.micro_batch import MicroBatch
from megatron.engine.base import Engine
from megatron.training.micro_batches import take_micro_batches


@dataclass(frozen=True)
class Evaluation:
    """One result.

    Attributes:
        split: `validation` or `test`.
        loss: nats per token.
        batches: micro batches per rank.
        seconds: wall time.
        accuracy: share of right answers; None where the task has none.
    """

    split: str
    loss: float
    batches: int
    seconds: float
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float]:
        """Under NeoX's names: `validation/lm_loss`, `validation/lm_loss_ppl`; and `validation/accuracy` where there is one."""
        right = {} if self.accuracy is None else {f"{self.split}/accuracy": self.accuracy}
        return {f"{self.split}/lm_loss": self.loss, f"{self.split}/lm_loss_ppl": self.perplexity, **right}


class Evaluator:
    """Evaluates an engine on one split.

    Args:
        engine: computes the loss.
        open_batches: returns an iterator from this rank's first micro batch of the split.
        eval_iters: evaluation steps; each is `gradient_accumulation` micro batches, as in NeoX.
        split: prefix of the metrics.
        fixed: read the same batches each time.
        stop_asked: called between chunks, alike on every rank; true aborts the evaluation.
    """

    def __init__(
        self,
        engine: Engine,
        open_batches: Callable[[], Iterator[MicroBatch]],
        eval_iters: int,
        split: str = "validation",
        fixed: bool = True,
        stop_asked: Callable[[], bool] | None = None,
    ) -> None:
        self.engine, self.open_batches, self.split, self.fixed = engine, open_batches, split, fixed
        self.count = eval_iters * engine.gradient_accumulation
        self._stop_asked = stop_asked
        # Long enough that a pipeline's fill and drain take a small share of it.
        self._chunk = max(engine.gradient_accumulation, 4 * engine.mesh.pp, 8)
        self._running: Iterator[Any] | None = None

    def __call__(self) -> Evaluation | None:
        """Evaluate now; every rank must call this. None when it was aborted because the run is to end.

        Raises:
            DataError: the split has fewer batches than `eval_iters` needs.
        """
        begin = time.perf_counter()
        batches: Iterator[Any] = self._running or iter(self.open_batches())
        total, right, answers, done = 0.0, 0, 0, 0
        while done < self.count:
            if self._stop_asked is not None and self._stop_asked():
                self._running = None
                return None
            chunk = min(self._chunk, self.count - done)
            self.engine.phase("evaluation")
            result = self.engine.eval_loss(take_micro_batches(batches, chunk))
            total += result.loss * chunk
            right, answers = right + result.right_answers, answers + result.answers
            done += chunk
        self._running = None if self.fixed else batches
        accuracy = right / answers if answers else None
        return Evaluation(self.split, total / self.count, self.count, time.perf_counter() - begin, accuracy)
