"""Every model has a YAML: each field of `ModelConfig` and each option of each mixer, said by keys and read back."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron.config.load import load_config
from megatron.errors import ConfigError
from megatron.interop.hf_classes import METALA_ACTIVATIONS
from megatron.model.config import ModelConfig
from megatron.model.resolved import resolved
from megatron.recipe import Start, announcement, command, model_keys, write_recipe
from megatron.registry import layer_options
from megatron.settings import model_config, tokenizer_of, vocabulary_rows
from tests.data.hf_files import write

BASE = ModelConfig(
    64, 32, 2, 4, 48, ("global", "global"), {"global": {"positions": "rotary"}}, norm="rmsnorm", norm_eps=3e-6,
    activation="gelu", mlp_bias=True, init_std=0.03,
)  # fmt: skip
# field -> what is changed in BASE: other values than BASE has, and others than the configuration's defaults
CHANGES: dict[str, list[dict[str, Any]]] = {
    "vocab_size": [{"vocab_size": 100}],
    "hidden_size": [{"hidden_size": 48}],
    "num_layers": [{"num_layers": 3, "layer_types": ("global", "metala", "sliding")}],
    "num_heads": [{"num_heads": 8}],
    "mlp_width": [{"mlp_width": 57}],
    "layer_types": [{"layer_types": ("mamba", "based"), "layer_options": {}}, {"layer_types": ("alibi", "flash")}],
    "layer_options": [{"layer_options": {}}],
    "norm": [{"norm": n} for n in ("layernorm", "layernorm_no_bias", "simplermsnorm", "non_parametric_layernorm")],
    "norm_eps": [{"norm_eps": 1e-3}, {"norm_eps": 1e-3, "norm": "simplermsnorm"}, {"norm_eps": 1e-3, "norm": "layernorm"}],
    "mlp": [{"mlp": "plain"}, {"mlp": "none"}],
    "activation": [
        {"activation": name, "mlp": form}
        for name in (*METALA_ACTIVATIONS, "gelu_tanh", "softsign", "mish")
        for form in ("gated", "plain")
    ],
    "mlp_bias": [{"mlp_bias": False}],
    "tie_embeddings": [{"tie_embeddings": False}],
    "embedding_scale": [{"embedding_scale": True}],
    "hidden_dropout": [{"hidden_dropout": 0.25}],
    "init_method": [{"init_method": "small_init"}],
    "output_init_method": [{"output_init_method": "wang_init"}],
    "init_std": [{"init_std": 0.5}],
    "residual_fp32": [{"residual_fp32": True}],
    "learned_positions": [{"learned_positions": 50}, {"learned_positions": 50, "layer_options": {}}],
    "embedding_norm": [{"embedding_norm": True}],
    "parallel_residual": [{"parallel_residual": True}],
    "shared_norm": [{"shared_norm": True, "parallel_residual": True}],
    "mixer_init": [{"mixer_init": kind, "layer_types": ("mamba", "mamba"), "layer_options": {}} for kind in ("methods", "own")],
}
TEXTS = {"positions": "alibi", "gate_round": "bf16"}


def start(config: ModelConfig, folder: Path, **facts: Any) -> Start:
    """A checkpoint that is not there: a recipe does not look into it."""
    checkpoint = folder / "checkpoints" / "global_step0"
    checkpoint.mkdir(parents=True, exist_ok=True)
    return Start(checkpoint, config, "float32", "nothing", **facts)


def read_back(config: ModelConfig, folder: Path) -> ModelConfig:
    """The model that its YAML says."""
    return model_config(load_config([write_recipe(start(config, folder))], world_size=1), config.vocab_size)


def test_the_table_names_every_field() -> None:
    assert set(CHANGES) == {f.name for f in fields(ModelConfig)}, "give the new field a key, and add it to `model_keys`"


@pytest.mark.parametrize("name", CHANGES)
def test_every_field(name: str, tmp_path: Path) -> None:
    for change in CHANGES[name]:
        config = replace(BASE, **change)
        assert resolved(read_back(config, tmp_path)) == resolved(config)


@pytest.mark.parametrize("mixer", sorted(layer_options()))
def test_every_option_of_every_mixer(mixer: str, tmp_path: Path) -> None:
    for name, option in layer_options()[mixer].items():
        default = option.default
        value: Any = "rotary" if default == "alibi" else TEXTS.get(name, default)
        if isinstance(default, bool):
            value = not default
        elif not isinstance(default, str):
            value = (
                2 + (name == "dt_rank")
                if default is None or default == 0
                else default / 2
                if isinstance(default, float)
                else 2 * default
            )
        if name in ("dropout", "slope_factor"):
            value = 0.5
        extra = {"positions": "rotary"} if name.startswith("rotary") and mixer == "global" else {}
        extra |= {"positions": "alibi"} if name in ("bias_max", "train_length", "slope_factor") else {}
        extra |= {"decay": True} if name == "decay_const" else {}
        config = replace(BASE, layer_types=(mixer, mixer), layer_options={mixer: {name: value, **extra}})
        plain = replace(config, layer_options={mixer: extra} if extra else {})
        assert resolved(config) != resolved(plain), f"{name} is not tried"
        assert resolved(read_back(config, tmp_path)) == resolved(config), name
        mixed = replace(config, layer_types=(mixer, "sliding", "alibi"), num_layers=3)
        assert resolved(read_back(mixed, tmp_path)) == resolved(mixed), f"{name} beside others"


def test_neox_keys_are_used_where_they_say_it() -> None:
    grouped = replace(BASE, layer_options={"global": {"positions": "rotary", "kv_heads": 2, "rotary_base": 5e5, "window": 9}})
    keys = model_keys(grouped)
    assert {
        "pos_emb": "rotary",
        "num_kv_heads": 2,
        "rotary_emb_base": 500_000,
        "sliding_window_width": 9,
    }.items() <= keys.items()
    assert not any(key.startswith("global_") for key in keys) and keys["attention_config"] == [[["global"], 2]]
    assert (
        model_keys(replace(BASE, layer_options={"global": {"positions": "rotary", "rotary_base": 0.5}}))["global_rotary_base"]
        == 0.5
    )


def test_lengths_data_and_tokenizer(tmp_path: Path) -> None:
    asked = start(BASE, tmp_path, longest=8192)
    run = load_config([write_recipe(asked)], world_size=1)
    assert (run.model.seq_length, run.model.max_position_embeddings, run.precision.dtype) == (2048, 8192, "fp32")
    assert command(asked) == f"python deepy.py train.py {tmp_path}/checkpoints/continue.yml --set 'train_stream=[TEXT.jsonl]'"
    (tmp_path / "text.jsonl").touch()
    told = start(BASE, tmp_path, data=str(tmp_path / "text.jsonl"))
    assert load_config([write_recipe(told)]).data.train_stream == (str(tmp_path / "text.jsonl"),)
    assert command(told).endswith("continue.yml")
    (tmp_path / "mine.idx").touch()
    assert load_config([write_recipe(start(BASE, tmp_path, data=str(tmp_path / "mine")))]).data.data_path == str(
        tmp_path / "mine"
    )
    prefix = replace(BASE, layer_types=("jrt", "jrt"), layer_options={"jrt": {"prefix_length": 1500}})
    run = load_config([write_recipe(start(prefix, tmp_path))], world_size=1)
    assert (run.training.objective, run.model.seq_length) == ("jrt", 3000)
    half = replace(start(BASE, tmp_path), dtype="bfloat16")
    assert load_config([write_recipe(half)]).precision.dtype == "bfloat16"


def test_a_tokenizer_without_a_padding_token_fits_its_vocabulary(tmp_path: Path) -> None:
    """Llama's has none: the one that is added would be a row that the embedding does not have."""
    asked = start(replace(BASE, vocab_size=270), tmp_path)
    assert "set its tokenizer first" in announcement(asked)
    (asked.checkpoint / "tokenizer").mkdir()
    assert "set its tokenizer" not in announcement(asked)
    file = write(asked.checkpoint / "tokenizer" / "tokenizer.json")
    file.write_text(file.read_text("utf-8").replace("<|padding|>", "<unk>"), "utf-8")
    run = load_config([write_recipe(asked)], world_size=1)
    tokenizer = tokenizer_of(run)
    assert tokenizer.vocab_size == 271 and vocabulary_rows(run, tokenizer) == 270
    run = load_config([write_recipe(asked)], world_size=1, overrides={"pack_impl": "unpacked"})
    with pytest.raises(ConfigError, match="smaller than the tokenizer's 271 entries"):
        vocabulary_rows(run, tokenizer)  # samples are filled up with the padding token there
