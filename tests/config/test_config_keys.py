"""The promise about NeoX's keys: all 318 are in the table, with the original's types and defaults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config import kinds
from megatron.config import neox_keys as neox_keys_module
from megatron.config.catalog import catalog
from megatron.config.frozen import thaw
from megatron.config.neox_keys import neox_keys, older_keys
from megatron.config.own_keys import OWN_KEYS, REFUSED_VALUES
from megatron.config.schema import key_fields

TABLE = Path(neox_keys_module.__file__).with_suffix(".tsv")

# Defaults that differ from NeoX's: key -> why.
OTHER_DEFAULTS = {
    "num_layers": "0 means not given, so that the field is a plain int",
    "hidden_size": "0 means not given",
    "num_attention_heads": "0 means not given",
    "seq_length": "0 means not given",
    "max_position_embeddings": "0 means not given; follows seq_length",
    "train_iters": "0 means not given",
    "train_batch_size": "0 means not given",
    "train_micro_batch_size_per_gpu": "0 means not given",
    "gradient_accumulation_steps": "unset by default, so that it is inferred (NeoX: 1)",
    "optimizer": "the default NeoX fills in later",
    "precision": "the value NeoX derives",
    "run_dir": "derived",
    "world_size": "0 means not known",
}
# Types that are stricter or wider than NeoX's: key -> why.
OTHER_TYPES = {
    "norm": "one more choice, simplermsnorm",
    "activation": "the functions of the released MetaLA code besides",
    "launcher": "mpich, torchrun and none besides",
    "text_gen_type": "NeoX accepts any text and fails later",
    "distributed_backend": "NeoX accepts any text and fails later",
    "eval_tasks": "list of texts",
}


def test_names_types_and_defaults_are_neox(golden: Callable[[str], Any]) -> None:
    keys = golden("config_keys.json")["keys"]
    assert len(keys) == len(neox_keys()) == 318
    for key in keys:
        row = neox_keys()[key["name"]]
        assert (row.kind, row.default) == (key["type"], key["default"]), key["name"]


def test_sections_keep_neox_defaults_and_types() -> None:
    for name, field in key_fields().items():
        row = neox_keys().get(name)
        if row is None:
            assert name in OWN_KEYS
            continue
        if name not in OTHER_DEFAULTS:
            assert thaw(field.default) == row.default, name
        ours = kinds.type_name(field.info.annotation)
        if name not in OTHER_TYPES:
            assert ours == kinds.type_name(kinds.parse_type(row.kind)), name


def test_the_table_names_each_key_and_each_reason_once() -> None:
    rows = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines() if line[0] not in "#["]
    assert [name for name, count in Counter(row[0] for row in rows).items() if count > 1] == []
    texts = [row[-1] for row in rows if len(row) in (2, 6) and row[3:4] != ["alias"]]
    reasons = {row[0] for row in rows if row[0].startswith("@")}
    assert reasons == {text for text in texts if text.startswith("@")}
    assert [text for text, count in Counter(texts).items() if count > 1 and text not in reasons] == []
    assert {row[3] for row in rows if len(row) == 5} == {"implemented"}


def test_every_row_says_something() -> None:
    for row in neox_keys().values():
        assert row.doc.endswith((".", "?")), row.name
        assert (row.status == "implemented") == (row.reason == ""), row.name
    assert not set(OWN_KEYS) & set(neox_keys())
    assert not set(older_keys()) & set(neox_keys())


def test_implemented_keys_have_a_section_and_aliases_a_target() -> None:
    for row in neox_keys().values():
        if row.status == "implemented":
            assert row.name in key_fields(), row.name
        if row.status == "alias":
            assert row.reason.split(".")[0] in key_fields(), row.name
    assert set(OWN_KEYS) <= set(key_fields())


def test_refused_values_are_choices() -> None:
    for key, values in REFUSED_VALUES.items():
        annotation = key_fields()[key].info.annotation
        allowed = (True, False) if annotation is bool else kinds.choices(annotation)
        assert set(values) <= set(allowed), key


def test_options_of_mixers_are_keys() -> None:
    info = catalog()["metala_conv_width"]
    assert (info.section, info.section_layer, info.layer_field, info.default) == ("layers", "metala", "conv_width", 4)


def test_counts_add_up() -> None:
    counts = Counter(row.status for row in neox_keys().values())
    assert sum(counts.values()) == 318
    assert counts["implemented"] > 100
