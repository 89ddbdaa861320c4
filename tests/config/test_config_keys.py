"""The promise about NeoX's keys: all 318 are in the table, with the original's types and defaults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config import key_types
from megatron.config import neox_keys as neox_keys_module
from megatron.config.catalog import catalog
from megatron.config.frozen import thaw
from megatron.config.neox_keys import neox_keys, older_keys, refused_values
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
            continue
        if name not in OTHER_DEFAULTS:
            assert thaw(field.default) == row.default, name
        ours = key_types.type_name(field.info.annotation)
        if name not in OTHER_TYPES:
            assert ours == key_types.type_name(key_types.parse_type(row.kind)), name


def test_the_table_names_each_key_and_each_reason_once() -> None:
    rows = [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines() if line[0] not in "#["]
    rows = rows[: next(number for number, row in enumerate(rows) if row[0] == "optimizer" and row[1] == "type")]
    names = Counter(row[0] for row in rows if len(row) != 3)
    assert [name for name, count in names.items() if count > 1] == []
    texts = Counter(row[-1] for row in rows if len(row) != 5 and row[3:4] != ["alias"])
    shared = {name for name in names if name.startswith("@")}
    assert shared == {text for text, count in texts.items() if count > 1}
    assert {row[3] for row in rows if len(row) == 5} == {"implemented"}


def test_every_row_says_something() -> None:
    for row in neox_keys().values():
        assert row.doc.endswith((".", "?")), row.name
        assert (row.status == "implemented") == (row.reason == ""), row.name
    assert not set(older_keys()) & set(neox_keys())


def test_our_keys_are_documented_beside_the_field_and_those_of_neox_in_the_table() -> None:
    for name, field in key_fields().items():
        doc = field.info.description or ""
        assert doc.endswith(".") if name not in neox_keys() else doc == "", name
        assert catalog()[name].doc == (neox_keys()[name].doc if name in neox_keys() else doc)


def test_implemented_keys_have_a_section_and_aliases_a_target() -> None:
    for row in neox_keys().values():
        if row.status == "implemented":
            assert row.name in key_fields(), row.name
        if row.status == "alias":
            assert row.reason.split(".")[0] in key_fields(), row.name


def test_refused_values_are_choices() -> None:
    for key, values in refused_values().items():
        assert set(values) <= set(key_types.choices(key_fields()[key].info.annotation)), key


def test_options_of_mixers_are_keys() -> None:
    info = catalog()["metala_conv_width"]
    assert (info.section, info.section_layer, info.layer_field, info.default) == ("layers", "metala", "conv_width", 4)


def test_counts_add_up() -> None:
    counts = Counter(row.status for row in neox_keys().values())
    assert sum(counts.values()) == 318
    assert counts["implemented"] > 100
