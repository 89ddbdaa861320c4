"""Every implemented key, set in a YAML to a value that is not its default, arrives at the part that uses it.

The keys come from the schema: a new one without a row in `tests/arrival` fails here. A row is tried with and without the key,
so that one which sees nothing fails too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.config.catalog import catalog
from megatron.config.frozen import thaw
from megatron.errors import UserError
from tests.arrival import edge_keys, model_keys, run_keys
from tests.arrival.arrivals import Arrival
from tests.arrival.case import BASE, Case, make_ground

ROWS: dict[str, Arrival] = {
    **model_keys.MODEL,
    **model_keys.MIXERS,
    **{key: row for table in run_keys.TABLES for key, row in table.items()},
    **{key: row for table in edge_keys.TABLES for key, row in table.items()},
}
# Keys whose only value, or whose effect, leaves nothing to arrive.
NOTHING_ARRIVES = {
    "dataset_impl": "gpt2 is the only value that is not refused",
    "data_impl": "the file itself tells its format, see data/indexed.py",
    "log_grad_norm": "the norm is always logged",
    "alibi_positions": "an ALiBi layer has no other value",
}
IMPLEMENTED = sorted(name for name, info in catalog().items() if info.status == "implemented")


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arrive")
    make_ground(folder)
    return folder


@pytest.fixture(scope="module")
def without() -> dict[str, Case]:
    """Cases without the key in question, which many rows share."""
    return {}


@pytest.fixture(autouse=True)
def _there(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ground)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_every_implemented_key_has_a_row() -> None:
    assert sorted([*ROWS, *NOTHING_ARRIVES]) == IMPLEMENTED


def _same(received: Any, expected: Any, row: Arrival) -> bool:
    if isinstance(expected, float):
        return bool(received == pytest.approx(expected, rel=row.tolerance))
    if isinstance(expected, list) and isinstance(received, (list, tuple)):
        return len(received) == len(expected) and all(_same(f, e, row) for f, e in zip(received, expected, strict=True))
    return bool(received == expected)


@pytest.mark.parametrize("key", sorted(ROWS))
def test_a_key_that_is_set_arrives(key: str, ground: Path, without: dict[str, Case]) -> None:
    row = ROWS[key]
    info = catalog()[key]
    assert thaw(row.value) != thaw(info.default), "the row must set something else than the default"
    beside = {**BASE, **row.beside}
    name = repr(sorted(beside.items(), key=lambda pair: pair[0]))
    if name not in without:
        without[name] = Case(beside, ground / f"without{len(without)}.yml")
    case = Case({**beside, **_cleared(key), key: row.value}, ground / "with.yml")
    received, usual = row.look(case), _usual(row, without[name])
    assert _same(received, row.expected, row), f"{key}: {row.value!r} in the YAML, {received!r} arrived"
    assert not _same(usual, row.expected, row), f"{usual!r} is there without {key} as well: the row sees nothing"


def _cleared(key: str) -> dict[str, Any]:
    """Keys of the base that the key takes the place of."""
    return {
        "train_epochs": {"train_iters": None},
        "train_stream": {"data_path": None},
        "synthetic": {"data_path": None, "padded_vocab_size": None},
        "train_data_paths": {"data_path": None},
    }.get(key, {})


def _usual(row: Arrival, case: Case) -> Any:
    """What is there without the key; nothing where a start does not call what the key is for."""
    try:
        return row.look(case)
    except (KeyError, AttributeError, UserError):
        return None
