"""linear-neox from Python: build, train, load, generate, evaluate and export linear-attention language models.

    import linear_neox as ln

    trainer = ln.Trainer(ln.load_config("configs/metala-quickstart.yml", train_iters=100))
    trainer.train()
    print(ln.generate(trainer, "import os\n", max_new_tokens=40))
    ln.export_hf(trainer.save("runs/mine/checkpoints"), "runs/mine/hf")

Importing this package is cheap; each name is loaded on first use. There is no second implementation:
every function calls the same code as the commands (`train.py`, `generate.py`, `eval.py`, ...). `docs/api.md` is the guide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from linear_neox._origin import check_megatron

if TYPE_CHECKING:
    from linear_neox.corpora import load_tokenizer as load_tokenizer
    from linear_neox.corpora import prepare_data as prepare_data
    from linear_neox.corpora import read_tokens as read_tokens
    from linear_neox.corpora import tokenize_files as tokenize_files
    from linear_neox.evaluating import perplexity as perplexity
    from linear_neox.evaluating import recall_sweep as recall_sweep
    from linear_neox.exchange import export_hf as export_hf
    from linear_neox.exchange import import_hf as import_hf
    from linear_neox.generating import generate as generate
    from linear_neox.mixers import list_mixers as list_mixers
    from linear_neox.mixers import register_mixer as register_mixer
    from linear_neox.models import Checkpoint as Checkpoint
    from linear_neox.models import build_model as build_model
    from linear_neox.models import count_parameters as count_parameters
    from linear_neox.models import load_checkpoint as load_checkpoint
    from linear_neox.models import load_config as load_config
    from linear_neox.models import model_config as model_config
    from linear_neox.training import Trainer as Trainer
    from linear_neox.training import train as train
    from megatron.config.schema import RunConfig as RunConfig
    from megatron.errors import UserError as UserError
    from megatron.layers.base import Context as Context
    from megatron.layers.base import Layer as Layer
    from megatron.layers.base import LayerConfig as LayerConfig
    from megatron.layers.base import State as State
    from megatron.model.config import ModelConfig as ModelConfig
    from megatron.model.lm import LanguageModel as LanguageModel

HOMES: dict[str, str] = {
    "Checkpoint": "linear_neox.models",
    "Context": "megatron.layers.base",
    "LanguageModel": "megatron.model.lm",
    "Layer": "megatron.layers.base",
    "LayerConfig": "megatron.layers.base",
    "ModelConfig": "megatron.model.config",
    "RunConfig": "megatron.config.schema",
    "State": "megatron.layers.base",
    "Trainer": "linear_neox.training",
    "UserError": "megatron.errors",
    "build_model": "linear_neox.models",
    "count_parameters": "linear_neox.models",
    "export_hf": "linear_neox.exchange",
    "generate": "linear_neox.generating",
    "import_hf": "linear_neox.exchange",
    "list_mixers": "linear_neox.mixers",
    "load_checkpoint": "linear_neox.models",
    "load_config": "linear_neox.models",
    "load_tokenizer": "linear_neox.corpora",
    "model_config": "linear_neox.models",
    "perplexity": "linear_neox.evaluating",
    "prepare_data": "linear_neox.corpora",
    "read_tokens": "linear_neox.corpora",
    "recall_sweep": "linear_neox.evaluating",
    "register_mixer": "linear_neox.mixers",
    "tokenize_files": "linear_neox.corpora",
    "train": "linear_neox.training",
}
"""Public name -> the module that defines it."""

__all__ = [*HOMES, "__version__"]

check_megatron()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("megatron").__version__
    if name not in HOMES:
        raise AttributeError(f"module 'linear_neox' has no attribute '{name}'")
    value = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
