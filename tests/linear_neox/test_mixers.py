"""A mixer that is registered at run time: its name, its options, its checkpoints, its export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import linear_neox as ln
from megatron import registry
from megatron.config import nested, values
from megatron.config.catalog import catalog
from tests.tiny_run import write_run

FILE = '''"""A convolution of another width: all that a test needs of a mixer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import linear_neox as ln
from linear_neox import Context, LayerConfig, State
from megatron.layers.base_conv import BaseConv

FACTOR = 0.5


@ln.register_mixer
class Halved(BaseConv):
    """Half of what a BaseConv says."""

    names: ClassVar[tuple[str, ...]] = ("halved",)

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options."""

        conv_width: int = 3
        """Taps."""
        expand: int = 1
        """Channels."""
        bias: bool = True
        """Biases."""

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Half."""
        y, after = super().forward(x, ctx, state)
        return y * FACTOR, after

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """Half."""
        y, after = super().step(x, state, ctx)
        return y * FACTOR, after


print("imported")
'''


@pytest.fixture
def halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the mixer above, imported from a file; forgotten afterwards."""
    (tmp_path / "halved_mixer.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(registry._registered)
    yield __import__("halved_mixer")
    del sys.modules["halved_mixer"]
    registry._registered.clear()
    registry._registered.update(before)
    for cached in (registry._table, catalog, nested.nested_catalog, values._adapter):
        cached.cache_clear()


def test_its_name_and_options_are_known_at_once(halved: ModuleType) -> None:
    assert "halved" in ln.list_mixers()
    config = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "seq_length": 8,
        "attention_config": [[["halved"], 2]],
    }
    shape = ln.model_config({**config, "halved_expand": 3}, vocab_size=32)
    assert shape.layer_options == {"halved": {"expand": 3}}
    assert registry.layer_info("halved").options["expand"].doc == "Channels."
    logits, _ = ln.build_model(shape)(torch.zeros(1, 5, dtype=torch.long))
    assert logits.shape == (1, 5, 32)
    with pytest.raises(ln.UserError, match="halved_expnd"):
        ln.load_config({**config, "halved_expnd": 3})


def test_it_is_trained_saved_and_exported_from_its_own_file(halved: ModuleType, tmp_path: Path) -> None:
    config = write_run(tmp_path / "run", train_iters=2, attention_config=[[["halved"], 2]])
    trainer = ln.Trainer(config)
    trainer.train()
    exported = ln.export_hf(trainer.save(tmp_path / "save"), tmp_path / "hf")
    assert exported.difference < 1e-5
    text = next((tmp_path / "hf").glob("modeling_*.py")).read_text()
    assert "FACTOR = 0.5" in text and "class Halved(BaseConv)" in text
    assert "register_mixer" not in text and "linear_neox" not in text and 'print("imported")' not in text


def test_a_cell_that_runs_again_replaces_its_class(halved: ModuleType) -> None:
    newer: Any = type("Halved", (halved.Halved,), {"__module__": "halved_mixer"})
    ln.register_mixer(newer)
    assert registry.layer_class("halved") is newer


def test_a_name_that_is_taken_is_refused_and_nothing_changes(halved: ModuleType) -> None:
    thief: Any = type("Thief", (halved.Halved,), {"names": ("metala",)})
    with pytest.raises(ln.UserError, match="two token mixers are called 'metala'"):
        ln.register_mixer(thief)
    assert registry.layer_class("metala").__name__ == "MetaLA"
    other: Any = type("Other", (halved.Halved,), {"names": ("halved",)})
    with pytest.raises(ln.UserError, match="two token mixers are called 'halved'"):
        ln.register_mixer(other)
    assert registry.layer_class("halved") is halved.Halved


@pytest.mark.parametrize(
    ("cls", "words"),
    [(dict, "not a token mixer"), (type("Nameless", (ln.Layer,), {}), "has no name"), (3, "not a token mixer")],
)
def test_what_is_no_mixer_is_refused(cls: Any, words: str) -> None:
    with pytest.raises(ln.UserError, match=words):
        ln.register_mixer(cls)
