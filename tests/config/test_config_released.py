"""Our files of the released Based, JRT, Attention and Mamba models: parameter counts, layers, recipes (spec 1.2 and 4)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.engine.optim import decays
from megatron.errors import ConfigError
from megatron.model.build import param_specs
from megatron.model.cost import count_parameters
from megatron.settings import masking, model_config, objective, schedule_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# file, changed keys -> parameters of spec 1.2, counted on the meta device
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "based-360m": ("based-360m", {}, 362_620_928),
    "based-360M-30B": ("based-360m", {"based_decay": True, "train_iters": 60000}, 362_702_848),
    "based-1b": ("based-1b", {}, 1_349_453_056),
    "JRT-360M-30B": ("jrt-360m", {}, 356_578_304),
    "JRT-1B-50B": ("jrt-1b", {}, 1_375_143_168),
    "attn-360m": ("attention-360m", {}, 359_810_048),
    "attn-1b": ("attention-1b", {}, 1_303_856_400),
    "mamba-360m": ("mamba-360m", {}, 358_190_080),
    "mamba-1b": ("mamba-1b", {}, 1_319_311_360),
}
FILES = sorted({name for name, _, _ in MODELS.values()} | {"based-1b-50b", "based-360m-wikitext"})
STEPS = {"jrt-360m": 60_000, "jrt-1b": 100_000, "based-1b-50b": 100_000}


def load(name: str, changes: dict[str, Any] | None = None, world_size: int = 8) -> RunConfig:
    return load_config([name, "local_setup"], conf_dir=str(CONFIGS), overrides=changes or {}, world_size=world_size)


@pytest.mark.parametrize("model", MODELS)
def test_parameters_of_the_released_models(model: str) -> None:
    file, changes, count = MODELS[model]
    run = load(file, changes)
    assert run.tokenizer.padded_vocab_size is not None
    assert count_parameters(model_config(run, run.tokenizer.padded_vocab_size))[0] == count


def test_attention_with_the_other_mlp_width() -> None:
    run = load("attention-1b", {"intermediate_size": 4608})
    assert count_parameters(model_config(run, 50272))[0] == 1_327_080_720


@pytest.mark.parametrize("name", ["based-360m", "based-1b", "jrt-360m", "jrt-1b"])
def test_layers_stand_where_the_originals_have_them(name: str) -> None:
    types = load(name).model.layer_types
    linear = [i for i, kind in enumerate(types) if kind in ("based", "jrt")]
    assert linear == [1, 6, 11, 16, 21] + ([27, 33] if "1b" in name else [])
    assert [i for i, kind in enumerate(types) if kind == "sliding"] == [i + 1 for i in linear]
    assert {types[i] for i in linear} == {"jrt" if "jrt" in name else "based"}


@pytest.mark.parametrize("name", FILES)
def test_recipe(name: str) -> None:
    """524,288 tokens per step, timm's cosine with its warm-up from 1e-6, weight decay on norms and not on the embedding."""
    run = load(name)
    steps = STEPS.get(name, 20_000)
    assert run.warnings == () and run.training.train_iters == steps
    assert run.batch.train_batch_size * run.model.seq_length == 524_288
    rate, w = schedule_of(run), steps // 100
    for t in (0, 1, w // 2, w - 1, w, w + 1, steps // 2, steps - 1):
        if t < w:
            want = 1e-6 + t * (8e-4 - 1e-6) / w
        else:
            want = 8e-5 + 0.5 * 7.2e-4 * (1 + math.cos(math.pi * (t - w) / (steps - w)))
        assert abs(rate(t) - want) <= 1e-12, t
    assert run.tokenizer.padded_vocab_size is not None
    specs = param_specs(model_config(run, run.tokenizer.padded_vocab_size))
    rested = {
        spec.name.rpartition("token_mixer.")[2] for spec in specs.values() if not decays(spec, run.optimizer.weight_decay_rule)
    }
    assert "model.embed_tokens.weight" in rested and not any(n.endswith("_norm.weight") for n in rested)
    assert all(n.endswith("bias") or n in ("A_log", "D") for n in rested - {"model.embed_tokens.weight"})


def test_jrt_hides_tokens_of_its_prefix() -> None:
    run = load("jrt-360m")
    goal, hidden = objective(run), masking(run, 50264)
    assert (goal.name, goal.prefix_length, goal.masked_weight) == ("jrt", 1024, 0.25)
    assert hidden is not None and (hidden.mask_token, hidden.rate, hidden.prefix_length) == (50263, 0.15, 1024)
    assert masking(load("based-360m"), 50264) is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"objective": "causal"}, "objective causal with jrt layers"),
        ({"objective_prefix_length": 512}, "is not jrt_prefix_length"),
        ({"jrt_prefix_length": 2048}, "leaves nothing"),
    ],
)
def test_objectives_that_cannot_be_meant(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        objective(load("jrt-360m", changes))
    with pytest.raises(ConfigError, match="outside the vocabulary"):
        masking(load("jrt-360m", {"objective_mask_token": 60000}), 50264)
