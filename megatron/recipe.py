"""Writes a YAML that continues training of imported weights: the inverse of `settings.model_config`.

`model_keys` converts every field of a `ModelConfig` to configuration keys; reading them back yields an equal model after
resolving defaults (`model/resolved.py`). `write_recipe` adds the path of the weights and conservative training settings, and
verifies the file by loading it.
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

_MAX_TOKENS = 2048
_EPSILON = {"rmsnorm": "rms_norm_epsilon", "simplermsnorm": "simplermsnorm_epsilon"}


def model_keys(config: ModelConfig) -> dict[str, Any]:
    """Configuration keys -> values of this model; omits keys at their default, except for the main sizes."""
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
    always |= {"use_bias_in_mlp", "activation"}  # unset keys are derived from others
    always |= {"mixer_init"} if "mamba" in config.layer_types else set()
    # a mixer's own key overrides GPT-NeoX's, even if its value is the mixer's default
    always |= {key for key in options if catalog()[key].section == "layers"}
    return {k: v for k, v in (keys | options).items() if v is not None and (k in always or v != catalog()[k].default)}


def _pattern(types: tuple[str, ...]) -> list[Any]:
    return [[[types[0]], len(types)]] if len(set(types)) == 1 else list(types)


def _mlp_keys(config: ModelConfig) -> dict[str, Any]:
    """Keys of the MLP: type, width, activation and biases."""
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


def _option_keys(config: ModelConfig, base_keys: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the mixers: GPT-NeoX's key if all mixers that read it agree, else the mixers' own keys."""
    mixers = {layer_info(name).names[0]: name for name in dict.fromkeys(config.layer_types)}
    options = {first: layer_options(config, name) for first, name in mixers.items()}
    values_by_key: dict[str, list[Any]] = {}
    for first, mixer_options in options.items():
        for field, key in layer_info(first).neox_keys.items():
            values_by_key.setdefault(key, []).append(mixer_options[field])
    keys: dict[str, Any] = {}
    for key, values in values_by_key.items():
        value = key_types.fit(values[0], catalog()[key].annotation)
        if all(v == values[0] for v in values) and base_keys.get(key, "none") == "none" and _can_hold(key, value):
            keys[key] = value
    for first, mixer_options in options.items():
        inherited = layer_options(_with_options(config, first, _inherited_options(first, {**base_keys, **keys})), mixers[first])
        keys |= {f"{first}_{field}": value for field, value in mixer_options.items() if value != inherited[field]}
    if keys.get("num_kv_heads") == config.num_heads:
        del keys["num_kv_heads"]
    return keys


def _can_hold(key: str, value: Any) -> bool:
    """Whether a key can have this value."""
    annotation = catalog()[key].annotation
    return value is None or value in key_types.choices(annotation) or key_types.accepts(annotation, type(value))


def _inherited_options(mixer: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a mixer gets from GPT-NeoX's keys, at these values or their defaults."""
    values = {field: keys.get(key, catalog()[key].default) for field, key in layer_info(mixer).neox_keys.items()}
    return {field: value for field, value in values.items() if value is not None}


def _with_options(config: ModelConfig, mixer: str, options: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(config.to_dict() | {"layer_options": {mixer: dict(options)}})


@dataclass(frozen=True)
class Start:
    """The imported checkpoint that a recipe starts from.

    Attributes:
        checkpoint: `OUTPUT/global_stepN`.
        config: its model.
        dtype: dtype of its weights.
        source: description of its origin.
        longest: maximum length of the original model in tokens, None if unknown.
        data: prefix of token files or a file of text, None if unknown.
        tokenizer: tokenizer keys; None: the tokenizer in the checkpoint.
    """

    checkpoint: Path
    config: ModelConfig
    dtype: str
    source: str
    longest: int | None = None
    data: str | None = None
    tokenizer: Mapping[str, str] | None = None


def start_of(checkpoint: Path, config: ModelConfig, source: str, data: str | None = None) -> Start:
    """The `Start` of an imported checkpoint."""
    manifest = read_manifest(checkpoint)
    dtypes = {entry.dtype for entry in manifest.weights.values()}
    return Start(checkpoint, config, dtypes.pop() if len(dtypes) == 1 else "", source, manifest.facts.get("seq_length"), data)


def start_of_run(checkpoint: Path, config: ModelConfig, source: str, run: RunConfig) -> Start:
    """The `Start` of weights with a known configuration, including its tokenizer, data and length."""
    t, start = run.tokenizer, start_of(checkpoint, config, source, run.data.data_path)
    files = {"vocab_file": t.vocab_file, "merge_file": t.merge_file}
    tokenizer_keys = {"tokenizer_type": t.tokenizer_type, **{key: name for key, name in files.items() if name}}
    return replace(start, longest=run.model.max_position_embeddings or run.model.seq_length or None, tokenizer=tokenizer_keys)


def write_recipe(start: Start) -> Path:
    """Write `continue.yml` next to the checkpoint; returns its path.

    Raises:
        ConfigError: the model violates a rule of the configuration (sizes that do not divide).
    """
    path = start.checkpoint.parent / RECIPE
    path.write_text(recipe(start), encoding="utf-8")
    run = load_config([path], world_size=1)
    reloaded = model_config(run, start.config.vocab_size)
    assert resolved(reloaded) == resolved(start.config), "the keys do not reproduce the model"
    return path


def recipe(start: Start) -> str:
    """The text of the YAML."""
    output = start.checkpoint.parent
    stem = "continued" if output.name == "checkpoints" else f"{output.name}-continued"
    paths = {"load": str(output), "finetune": True, "save": str(output.parent / stem / "checkpoints")}
    lines = [
        f"# Continues training from the weights of {start.source}:",
        "#",
        f"#   {command(start)}",
        "#",
        "# The first start loads the weights from `load`, later starts resume from `save`. Learning rate and batch size are",
        "# conservative guesses; change them as needed.",
        "# the model; it must match the weights",
        *_lines(model_keys(start.config)),
        "# source of the weights, and folder of new checkpoints",
        *_lines({**paths, "checkpoint_factor": 500, "keep_last_n_checkpoints": 2}),
        *_data(start),
        "# training",
        *_lines(_training(start)),
    ]
    return "\n".join(lines) + "\n"


def command(start: Start) -> str:
    """The command that trains with the recipe."""
    words = ["python", "deepy.py", "train.py", str(start.checkpoint.parent / RECIPE)]
    return shlex.join(words if start.data else [*words, "--set", "train_stream=[TEXT.jsonl]"])


def announcement(start: Start) -> str:
    """Write the recipe; returns the message for the console."""
    path = write_recipe(start)
    lacks_tokenizer = start.tokenizer is None and not (start.checkpoint / "tokenizer").is_dir()
    note = "; set its tokenizer first, the weights have none" if lacks_tokenizer else ""
    return f"wrote {path}, which continues training from these weights{note}:\n  {command(start)}"


def _data(start: Start) -> Iterable[str]:
    """The tokenizer of the weights, and the data if known."""
    folder, data = start.checkpoint / "tokenizer", start.data
    yield "# tokenizer and data"
    if start.tokenizer is not None:
        yield from _lines(start.tokenizer)
    elif folder.is_dir():
        yield from _lines(_tokenizer(folder))
    else:
        yield "# the weights have no tokenizer: set tokenizer_type, vocab_file (and merge_file)"
    if data is None:
        yield "# data_path: prefix of token files, written by tools/datasets/preprocess_data.py with this tokenizer, or"
        yield "# train_stream: [TEXT.jsonl]"
    else:
        yield from _lines({"data_path": data} if Path(f"{data}.idx").is_file() else {"train_stream": [data]})


def _tokenizer(folder: Path) -> dict[str, Any]:
    names = sorted(path.name for path in folder.iterdir())
    for kind, suffix in (("SPMTokenizer", ".model"), ("TiktokenTokenizer", ".tiktoken")):
        matching = [name for name in names if name.endswith(suffix)]
        if matching and "tokenizer.json" not in names:
            return {"tokenizer_type": kind, "vocab_file": str(folder / matching[0])}
    return {"tokenizer_type": "HFGPT2Tokenizer", "vocab_file": str(folder)}


def _training(start: Start) -> dict[str, Any]:
    config = start.config
    prefix = config.layer_options.get("jrt", {}).get("prefix_length", 0) if "jrt" in config.layer_types else 0
    longest = config.learned_positions or start.longest or _MAX_TOKENS
    length = max(min(longest, _MAX_TOKENS), 2 * prefix)
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
