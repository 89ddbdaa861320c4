"""MetaLA under tensor parallelism: two all-reduces forward and two backward per layer and step, and nothing else."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from megatron.engine.base import EngineSettings
from megatron.parallel.traffic import Message, count_traffic
from tests.engine.engine_cases import GLOBAL, SEQ, for_step, make_engine, micro_batches, model_config
from tests.parallel.ranks import run_ranks

WIDTH = 32
ACTIVATION = GLOBAL * SEQ * WIDTH  # b x s x d, one micro batch


def _step(layers: int, tp: int) -> list[Message]:
    config = model_config(num_layers=layers, layer_types=("metala",) * layers)
    engine = make_engine(1, tp, "deepspeed", EngineSettings(gradient_clipping=0.5, zero_stage=1), config)
    batches = micro_batches(engine.mesh)
    engine.train_step(for_step(engine, batches), 1e-3)  # the first step makes connections
    with count_traffic() as messages:
        engine.train_step(for_step(engine, batches), 1e-3)
    return messages


def _kinds(messages: list[Message]) -> Counter[tuple[str, int, bool]]:
    return Counter((m.op, m.numel, m.backward) for m in messages)


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_two_all_reduces_each_way_per_layer_and_nothing_else(tp: int) -> None:
    two, four = (run_ranks(_step, tp, layers, tp) for layers in (2, 4))
    for few, many in zip(two, four, strict=True):
        more = _kinds(many) - _kinds(few)
        assert more == {("all_reduce", ACTIVATION, False): 4, ("all_reduce", ACTIVATION, True): 4}, more
        assert not _kinds(few) - _kinds(many)
        # Besides the layers: the embedding's sum, the head's gradient, the loss (maximum; sum and target), the norm.
        rest = _kinds(few) - Counter({("all_reduce", ACTIVATION, False): 4, ("all_reduce", ACTIVATION, True): 4})
        assert rest[("all_reduce", ACTIVATION, False)] == 1
        assert rest[("all_reduce", ACTIVATION, True)] == 1
        small = Counter({kind: n for kind, n in rest.items() if kind[1] != ACTIVATION})
        assert all(numel <= 2 * GLOBAL * SEQ for _, numel, _ in small), small


def _count_by_hand() -> list[Message]:
    x = torch.zeros(6, requires_grad=True)
    with count_traffic() as messages:
        dist.all_reduce(torch.zeros(3))
        dist.all_gather([torch.zeros(5) for _ in range(2)], torch.zeros(5))
        x.register_hook(lambda g: dist.all_reduce(g.clone()))
        x.sum().backward()
    dist.all_reduce(torch.zeros(3))
    return messages


def test_the_counter_counts() -> None:
    for messages in run_ranks(_count_by_hand, 2):
        assert [(m.op, m.numel, m.bytes, m.ranks, m.backward) for m in messages] == [
            ("all_reduce", 3, 12, 2, False),
            ("all_gather", 10, 40, 2, False),
            ("all_reduce", 6, 24, 2, True),
        ]
        assert [m.sent for m in messages] == [12.0, 20.0, 24.0]
