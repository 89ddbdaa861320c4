"""From a model to a YAML that trains it on: the reverse of `settings.model_config`, for weights that came from elsewhere.

`model_keys` says every field of a `ModelConfig` by configuration keys; reading them back gives a model that is equal once both
are resolved (`model/resolved.py`). `write_recipe` adds where the weights lie and a careful way to train, and proves the file by
reading it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint.compare import RECIPE
from megatron.checkpoint.manifest import read_manifest
from megatron.config import key_types
from megatron.config.catalog import catalog
from megatron.config.load import load_config
from megatron.config.schema import RunConfig
from megatron.model.config import ModelConfig
from megatron.model.resolved import layer_options, resolved
from megatron.registry import layer_info
from megatron.settings import model_config

_MOST_TOKENS = 2048
_EPSILON = {"rmsnorm": "rms_norm_epsilon", "simplermsnorm": "simplermsnorm_epsilon"}


def model_keys(config: ModelConfig) -> dict[str, Any]:
    """Configuration keys -> values that make this model; keys at their default are left out but for the main sizes."""
    keys: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "padded_vocab_size": config.vocab_size,
        "attention_config": _pattern(config.layer_types),
        "pos_emb": "learned" if config.learned_positions else "none",
        "max_position_embeddings": config.learned_positions or None,
        "norm": "layernorm" if config.norm == "layernorm_no_bias" else config.norm,
        "use_bias_in_norms": config.norm != "layernorm_no_bias",
        _EPSILON.get(config.norm, "layernorm_epsilon"): config.norm_eps,
        **_mlp_keys(config),
        "no_weight_tying": not config.tie_embeddings,
        "embedding_scale": config.embedding_scale,
        "embedding_norm": config.embedding_norm,
        "residual_fp32": config.residual_fp32,
        "hidden_dropout": config.hidden_dropout,
        "gpt_j_residual": config.parallel_residual,
        "gpt_j_tied": config.shared_norm,
        "init_method": config.init_method,
        "output_layer_init_method": config.output_init_method,
        "init_method_std": config.init_std,
        "mixer_init": config.mixer_init,
    }
    options = _option_keys(config, keys)
    always = {"num_layers", "hidden_size", "num_attention_heads", "attention_config", "pos_emb", "norm", "mlp_type"}
    always |= {"use_bias_in_mlp", "activation"}  # unset ones are derived from others
    always |= {"mixer_init"} if "mamba" in config.layer_types else set()
    # a mixer's own key beats GPT-NeoX's even where it says what the mixer's default is
    always |= {key for key in options if catalog()[key].section == "layers"}
    return {k: v for k, v in (keys | options).items() if v is not None and (k in always or v != catalog()[k].default)}


def _pattern(types: tuple[str, ...]) -> list[Any]:
    return [[[types[0]], len(types)]] if len(set(types)) == 1 else list(types)


def _mlp_keys(config: ModelConfig) -> dict[str, Any]:
    """Form, width, function and biases of the MLP."""
    if config.mlp == "none":
        return {"mlp_type": "none"}
    tanh = config.activation == "gelu_tanh"
    return {
        "mlp_type": "llama" if config.mlp == "gated" else "regular",
        "mlp_branch_size": config.mlp_width,
        "activation": "gelu" if tanh else config.activation,
        "bias_gelu_fusion": tanh,
        "use_bias_in_mlp": config.mlp_bias,
    }


def _option_keys(config: ModelConfig, said: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the mixers: by GPT-NeoX's key where all mixers that read it agree, by the mixer's own where they do not."""
    mixers = {layer_info(name).names[0]: name for name in dict.fromkeys(config.layer_types)}
    options = {first: layer_options(config, name) for first, name in mixers.items()}
    wanted: dict[str, list[Any]] = {}
    for first, own in options.items():
        for field, key in layer_info(first).neox_keys.items():
            wanted.setdefault(key, []).append(own[field])
    keys: dict[str, Any] = {}
    for key, values in wanted.items():
        value = key_types.fit(values[0], catalog()[key].annotation)
        if all(v == values[0] for v in values) and said.get(key, "none") == "none" and _holds(key, value):
            keys[key] = value
    for first, own in options.items():
        plain = layer_options(_with_options(config, first, _given(first, {**said, **keys})), mixers[first])
        keys |= {f"{first}_{field}": value for field, value in own.items() if value != plain[field]}
    if keys.get("num_kv_heads") == config.num_heads:
        del keys["num_kv_heads"]
    return keys


def _holds(key: str, value: Any) -> bool:
    """Can a key have this value?"""
    annotation = catalog()[key].annotation
    return value is None or value in key_types.choices(annotation) or key_types.accepts(annotation, type(value))


def _given(mixer: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The options that GPT-NeoX's keys, at these values or their defaults, give to a mixer."""
    values = {field: keys.get(key, catalog()[key].default) for field, key in layer_info(mixer).neox_keys.items()}
    return {field: value for field, value in values.items() if value is not None}


def _with_options(config: ModelConfig, mixer: str, options: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(config.to_dict() | {"layer_options": {mixer: dict(options)}})


@dataclass(frozen=True)
class Start:
    """The checkpoint of weights that a recipe starts from.

    checkpoint: `OUTPUT/global_stepN`. config: its model. dtype: of its weights. longest: tokens that it was made for, None when
    that is not known. source: what it was imported from, in words. data: token files' prefix or a file of text, None when
    nobody said. tokenizer: its keys, None for the one that lies in the checkpoint.
    """

    checkpoint: Path
    config: ModelConfig
    dtype: str
    source: str
    longest: int | None = None
    data: str | None = None
    tokenizer: Mapping[str, str] | None = None


def start_of(checkpoint: Path, config: ModelConfig, source: str, data: str | None = None) -> Start:
    """What there is to say about an imported checkpoint; see `Start`."""
    manifest = read_manifest(checkpoint)
    dtypes = {entry.dtype for entry in manifest.weights.values()}
    return Start(checkpoint, config, dtypes.pop() if len(dtypes) == 1 else "", source, manifest.facts.get("seq_length"), data)


def start_of_run(checkpoint: Path, config: ModelConfig, source: str, run: RunConfig) -> Start:
    """The same of weights whose configuration is known: its tokenizer, data and length are taken over."""
    t, start = run.tokenizer, start_of(checkpoint, config, source, run.data.data_path)
    files = {"vocab_file": t.vocab_file, "merge_file": t.merge_file}
    told = {"tokenizer_type": t.tokenizer_type, **{key: name for key, name in files.items() if name}}
    return replace(start, longest=run.model.max_position_embeddings or run.model.seq_length or None, tokenizer=told)


def write_recipe(start: Start) -> Path:
    """Write `continue.yml` beside the checkpoint; returns its path.

    Raises:
        ConfigError: the model breaks a rule of the configuration (sizes that do not divide).
    """
    path = start.checkpoint.parent / RECIPE
    path.write_text(recipe(start), encoding="utf-8")
    run = load_config([path], world_size=1)
    again = model_config(run, start.config.vocab_size)
    assert resolved(again) == resolved(start.config), "the keys do not say the model"
    return path


def recipe(start: Start) -> str:
    """The text of the YAML."""
    output = start.checkpoint.parent
    stem = "continued" if output.name == "checkpoints" else f"{output.name}-continued"
    places = {"load": str(output), "finetune": True, "save": str(output.parent / stem / "checkpoints")}
    parts = [
        f"# Trains on from the weights of {start.source}, as they stand:",
        "#",
        f"#   {command(start)}",
        "#",
        "# The first start takes the weights from `load`, every later one goes on in `save`. Rates and batch are guesses,",
        "# careful ones, yours to change.",
        "# the model; another one would not take the weights",
        *_lines(model_keys(start.config)),
        "# where it starts from, where it goes on",
        *_lines({**places, "checkpoint_factor": 500, "keep_last_n_checkpoints": 2}),
        *_data(start),
        "# how it is trained",
        *_lines(_training(start)),
    ]
    return "\n".join(parts) + "\n"


def command(start: Start) -> str:
    """What a person types to train with the recipe."""
    words = ["python", "deepy.py", "train.py", str(start.checkpoint.parent / RECIPE)]
    return shlex.join(words if start.data else [*words, "--set", "train_stream=[TEXT.jsonl]"])


def announcement(start: Start) -> str:
    """Write the recipe; what a command says about it."""
    path = write_recipe(start)
    bare = start.tokenizer is None and not (start.checkpoint / "tokenizer").is_dir()
    first = "; set its tokenizer first, none came with them" if bare else ""
    return f"wrote {path}, which trains on from these weights{first}:\n  {command(start)}"


def _data(start: Start) -> Iterable[str]:
    """The tokenizer that came with the weights, and the data where they are known."""
    folder, data = start.checkpoint / "tokenizer", start.data
    yield "# tokenizer and data"
    if start.tokenizer is not None:
        yield from _lines(start.tokenizer)
    elif folder.is_dir():
        yield from _lines(_tokenizer(folder))
    else:
        yield "# no tokenizer came with the weights: set tokenizer_type, vocab_file (and merge_file)"
    if data is None:
        yield "# data_path: prefix of token files that tools/datasets/preprocess_data.py made with this tokenizer, or"
        yield "# train_stream: [TEXT.jsonl]"
    else:
        yield from _lines({"data_path": data} if Path(f"{data}.idx").is_file() else {"train_stream": [data]})


def _tokenizer(folder: Path) -> dict[str, Any]:
    names = sorted(path.name for path in folder.iterdir())
    for kind, wanted in (("SPMTokenizer", ".model"), ("TiktokenTokenizer", ".tiktoken")):
        own = [name for name in names if name.endswith(wanted)]
        if own and "tokenizer.json" not in names:
            return {"tokenizer_type": kind, "vocab_file": str(folder / own[0])}
    return {"tokenizer_type": "HFGPT2Tokenizer", "vocab_file": str(folder)}


def _training(start: Start) -> dict[str, Any]:
    config = start.config
    prefix = config.layer_options.get("jrt", {}).get("prefix_length", 0) if "jrt" in config.layer_types else 0
    longest = config.learned_positions or start.longest or _MOST_TOKENS
    length = max(min(longest, _MOST_TOKENS), 2 * prefix)
    return {
        "seq_length": length,
        **({"max_position_embeddings": start.longest} if start.longest and not config.learned_positions else {}),
        **({"objective": "jrt"} if prefix else {}),
        **({"precision": "bfloat16"} if start.dtype == "bfloat16" else {"precision": "fp32"}),
        "optimizer": {"type": "Adam", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8}},
        "lr_decay_style": "cosine",
        "min_lr": 1e-6,
        "warmup": 0.01,
        "weight_decay": 0.1,
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": 1,
        "train_iters": 1000,
        "eval_interval": 500,
        "eval_iters": 10,
        "log_interval": 10,
    }


def _lines(values: Mapping[str, Any]) -> Iterable[str]:
    return (f"{key}: {json.dumps(value)}" for key, value in values.items())
