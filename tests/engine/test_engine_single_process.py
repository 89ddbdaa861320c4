"""The reference itself: against a hand-written step, low precision, loss scale, decay groups, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron.engine.base import EngineSettings
from megatron.engine.build import build_engine, choose_kind
from megatron.engine.deepspeed_config import deepspeed_config
from megatron.engine.loss_scale import LossScale
from megatron.engine.optim import FusedAdamW, build_optimizer, parameter_groups
from megatron.engine.stages import build_local
from megatron.errors import ConfigError, DataError
from megatron.model.build import build_model, param_specs
from megatron.model.loss import token_loss
from megatron.parallel.mesh import Mesh
from tests.engine.engine_cases import for_step, make_engine, micro_batches, model_config
from tests.parallel.ranks import run_ranks

CPU = torch.device("cpu")


def _by_hand() -> tuple[list[float], list[float]]:
    """Two steps of plain AdamW with decay groups and clipping, written out, against the engine."""
    settings = EngineSettings(gradient_accumulation=2, gradient_clipping=0.1, weight_decay=0.1, lr=1e-2)
    engine = make_engine(1, 1, "single", settings, model_config())
    model = build_model(model_config())
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(engine.weights()[name])
    decayed = [p for n, p in model.named_parameters() if engine.specs[n].decay]
    plain = [p for n, p in model.named_parameters() if not engine.specs[n].decay]
    assert decayed
    assert plain
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, foreach=False
    )
    ours, hand = micro_batches(engine.mesh), micro_batches(engine.mesh)
    losses = []
    for _ in range(3):
        total = 0.0
        for _ in range(2):
            batch = next(hand)
            loss = token_loss(model(batch.tokens)[0], batch.labels, batch.loss_mask) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return [float(engine.train_step(for_step(engine, ours), 1e-2).loss) for _ in range(3)], losses


def test_against_a_step_written_by_hand() -> None:
    ours, hand = run_ranks(_by_hand, 1, connect=False)[0]
    assert ours == pytest.approx(hand, rel=2e-6)


def _low(dtype: str) -> dict[str, Any]:
    settings = EngineSettings(gradient_accumulation=2, dtype=dtype, fp16={"initial_scale_power": 24})
    engine = make_engine(1, 1, "single", settings, model_config())
    batches = micro_batches(engine.mesh)
    results = [engine.train_step(for_step(engine, batches), 5e-3) for _ in range(25)]
    masters = {s.master.dtype for s in engine.optimizer_slices().values()}
    return {
        "losses": [float(r.loss) for r in results if not r.skipped],
        "skipped": [r.skipped for r in results],
        "dtypes": ({w.dtype for w in engine.weights().values()}, masters),
        "extra": engine.extra_state(),
    }


@pytest.mark.slow
def test_bf16_keeps_fp32_masters() -> None:
    got = run_ranks(_low, 1, "bfloat16", connect=False)[0]
    assert got["dtypes"] == ({torch.bfloat16}, {torch.float32})
    assert got["losses"][-1] < got["losses"][0]
    assert not any(got["skipped"])
    assert got["extra"] == {}


@pytest.mark.slow
def test_fp16_skips_overflows_and_finds_its_scale() -> None:
    got = run_ranks(_low, 1, "fp16", connect=False)[0]
    assert got["skipped"][0] and not got["skipped"][-1], "2^24 overflows half precision; a smaller scale does not"
    assert got["extra"]["loss_scale"]["value"] < 2**24
    assert got["losses"][-1] < got["losses"][0]


def _not_finite() -> tuple[bool, bool, float]:
    engine = make_engine(1, 1, "single", EngineSettings(), model_config())
    before = {n: w.clone() for n, w in engine.weights().items()}
    batch = next(micro_batches(engine.mesh))
    with torch.no_grad():
        engine.parameters()["model.layers.0.token_mixer.v_proj.weight"][0, 0] = float("inf")
    before["model.layers.0.token_mixer.v_proj.weight"][0, 0] = float("inf")
    result = engine.train_step([batch], 1e-2)
    same = all(torch.equal(w, before[n]) for n, w in engine.weights().items())
    return result.skipped, same, float(result.grad_norm)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing() -> None:
    assert run_ranks(_not_finite, 1, connect=False)[0] == (True, True, float("inf"))


def test_loss_scale_follows_the_rule() -> None:
    scale = LossScale(8.0, window=2, hysteresis=2, minimum=1.0)
    values = []
    for overflow in (True, True, True, False, False, True, True):
        scale.update(overflow)
        values.append(scale.value)
    assert values == [8.0, 4.0, 2.0, 2.0, 4.0, 4.0, 2.0]
    other = LossScale(1.0, window=2)
    other.load(scale.state())
    assert other.state() == scale.state()


def test_decay_groups_follow_the_specs() -> None:
    specs = param_specs(model_config())
    tensors = {name: torch.nn.Parameter(torch.zeros(1)) for name in specs}
    groups = parameter_groups(tensors, specs, 0.1, first=("model.embed_tokens.weight",))
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert len(groups[0]["params"]) == sum(s.decay for s in specs.values())
    assert groups[0]["params"][0] is tensors["model.embed_tokens.weight"]
    optimizer = build_optimizer(groups, EngineSettings(betas=(0.9, 0.95), eps=1e-7))
    assert all(g["fused"] and g["betas"] == (0.9, 0.95) and g["eps"] == 1e-7 for g in optimizer.param_groups)


def test_the_direct_step_is_torchs_bit_for_bit() -> None:
    start = [torch.randn(7, 5), torch.randn(33)]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    a, b = FusedAdamW(ours, fused=True, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for number in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = y.grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(number))
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)
        assert all(torch.equal(a.state[x][key], b.state[y][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("name", ["sgd", "lion", "onebitadam", "adamm"])
def test_other_optimizers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], EngineSettings(optimizer_type=name))


def test_only_the_own_stage_takes_memory() -> None:
    config, settings = model_config(), EngineSettings(seed=3)
    whole = build_local(config, Mesh.single(), settings, CPU)
    halves = [build_local(config, Mesh.shape_only(2, 1, 2, rank), settings, CPU) for rank in (0, 1)]
    assert halves[0].bounds == [0, 3, 7]
    assert halves[1].tied_copy
    assert not halves[0].tied_copy
    for half in halves:
        for name, param in half.parameters.items():
            assert torch.equal(param, whole.parameters[name]), "the same start whatever the pipeline"
        everything = [p for stage in half.all_stages for p in stage.module.parameters()]
        assert sum(p.device.type != "meta" for p in everything) == len(half.parameters)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [((1, 8, 8), "4 heads cannot be split"), ((5, 1, 5), "4 layers cannot fill 5 pipeline stages")],
)
def test_meshes_that_do_not_fit_are_refused(mesh: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_local(model_config(), Mesh.shape_only(*mesh, 0), EngineSettings(), CPU)


def test_engine_choice_and_settings() -> None:
    two = Mesh.shape_only(1, 2, 2, 0)
    assert choose_kind("auto", Mesh.single()) == "single"
    assert choose_kind("auto", two) == "deepspeed"
    for kind, mesh in (("single", two), ("megatron", two)):
        with pytest.raises(ConfigError):
            choose_kind(kind, mesh)
    with pytest.raises(ConfigError, match="precision"):
        EngineSettings(dtype="fp8")


def test_deepspeed_dictionary() -> None:
    settings = EngineSettings(micro_batch=2, gradient_accumulation=3, dtype="bf16", zero_stage=1)
    config = deepspeed_config(settings, Mesh.shape_only(1, 1, 4, 0), on_accelerator=False, local_params=1000)
    assert config["train_batch_size"] == 24
    assert config["bf16"] == {"enabled": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    half = replace(settings, dtype="fp16", fp16={"enabled": True, "loss_scale": 0, "type": "x"})
    assert deepspeed_config(half, Mesh.single(), True, 1)["fp16"] == {"enabled": True, "loss_scale": 0}
    zero = deepspeed_config(replace(settings, zero_stage=0), Mesh.single(), False, 1)
    assert zero["zero_optimization"]["stage"] == 1, "DeepSpeed clips wrongly at stage 0 with pipelines"
    three = replace(settings, zero_stage=3)
    assert deepspeed_config(three, Mesh.single(), False, 1)["zero_optimization"]["stage"] == 3
    for bad, stages in ((three, 2), (replace(settings, zero_stage=2), 2), (half, 1)):
        with pytest.raises(ConfigError):
            deepspeed_config(bad, Mesh.shape_only(stages, 1, stages, 0), False, 1)


def test_a_step_refuses_another_number_of_micro_batches() -> None:
    engine = build_engine("single", model_config(num_layers=1, layer_types=("metala",)), Mesh.single(), EngineSettings())
    with pytest.raises(DataError, match="of 1 micro batches was given 0"):
        engine.train_step([], 1e-3)
