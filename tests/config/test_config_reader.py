"""The YAML reader against the original: the same values from the same text, plus places and stricter duplicates."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.load import load_config
from megatron.config.problems import Problems
from megatron.config.yaml_reader import normalise_key, parse_scalar, parse_text, read_files, resolve_path
from megatron.errors import ConfigError

# Where we differ from the original reader on purpose: test name -> (what we do, why).
NUMBER = "1e-8 without a dot is a number here; in the original it is text and breaks the run later"
DUPLICATE = "a key with two values is always an error; the original lets the later one win"
HARMLESS = "the same value twice is no error here; the original refuses it in one spelling and takes it in two"
DIFFERENCES: dict[str, tuple[str, str]] = {
    "two files": ("values", NUMBER),
    "same key same spelling": ("values", HARMLESS),
    "float spellings": ("values", NUMBER),
    "json file": ("values", NUMBER),
    "hyphen in both files": ("error", DUPLICATE),
    "underscore first, hyphen second": ("error", DUPLICATE),
    "key twice in one file": ("error", DUPLICATE),
}


def _numbers(value: Any) -> Any:
    """The original's `1e-8` texts as the numbers we read."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, str) and value[:1].isdigit() and "e" in value.lower():
        return float(value)
    return value


def _read(text: str, label: str = "a.yml") -> dict[str, Any]:
    problems = Problems()
    values, _ = parse_text(text, label, problems)
    problems.raise_if_any()
    return values


@pytest.mark.parametrize("style", ["block", "flow", "json"])
def test_every_shipped_neox_file_reads_equal(golden: Callable[[str], Any], style: str) -> None:
    files = golden("configs_parsed/parsed.json")
    assert len(files) == 64
    for entry in files:
        expected = entry["parsed"]
        if style == "json":
            text, label = json.dumps(expected, indent="\t"), "a.json"
        else:
            text, label = yaml.safe_dump(expected, default_flow_style=style == "flow"), "a.yml"
        assert _read(text, label) == expected, entry["file"]


def test_merge_rules(golden: Callable[[str], Any], tmp_path: Path) -> None:
    compared = 0
    for case in golden("configs_parsed/merge_rules.json"):
        if "files" not in case:
            continue
        for file in case["files"]:
            (tmp_path / file["name"]).write_text(file["text"])
        problems = Problems()
        source = read_files([f["name"] for f in case["files"]], tmp_path, problems)
        kind = DIFFERENCES.get(case["test"], ("error" if "error" in case else "same", ""))[0]
        if kind == "error":
            assert problems.items, case["test"]
        else:
            merged = case.get("merged", {"seq_length": 2})  # the original has none where it refuses
            expected = _numbers(merged) if kind == "values" else merged
            assert source.values == expected, case["test"]
            assert {k: type(v) for k, v in source.values.items()} == {k: type(v) for k, v in expected.items()}
            assert not problems.items
        compared += 1
    assert compared == 12


def test_same_base_name_twice_is_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.yml").write_text(f"key_{folder}: 1\n")
    problems = Problems()
    read_files([tmp_path / "a" / "run", tmp_path / "b" / "run"], None, problems)
    assert "two config files are called run.yml" in problems.items[0].message


def test_duplicate_names_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("x: 1\nseq-length: 2\n")
    (tmp_path / "b.yml").write_text("# c\n\nseq_length: 3\n")
    problems = Problems()
    read_files(["a", "b"], tmp_path, problems)
    (only,) = problems.items
    assert f"{tmp_path}/a.yml:2" in only.place and f"{tmp_path}/b.yml:3" in only.place


@pytest.mark.parametrize(
    ("first", "second", "good"),
    [
        ("vocab-file: a.json", "vocab_file: a.json", True),
        ("vocab-file: a.json", "vocab_file: b.json", False),
        ("train-data-paths: [a, b]", "train_data_paths: [a, b]", True),
        ("train-data-paths: [a, b]", "train_data_paths: [b, a]", False),
        ("optimizer: {params: {lr: 1}}", "optimizer: {params: {lr: 1}}", True),
        ("load: null", "load: null", True),
        ("load: null", "load: a", False),
        ("use_wandb: 1", "use_wandb: true", False),
        ("seed: 1", "seed: 1.0", False),
    ],
)
@pytest.mark.parametrize("files", [2, 1])
def test_the_same_value_twice_is_no_error_and_two_values_are(
    tmp_path: Path, first: str, second: str, good: bool, files: int
) -> None:
    if files == 1 and ("[" in first or "{" in first):
        good = False  # within one file only plain values are compared
    texts = [first, second] if files == 2 else [f"{first}\n{second}\n"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yml").write_text(text)
    problems = Problems()
    source = read_files([f"{number}.yml" for number in range(len(texts))], tmp_path, problems)
    assert (not problems.items) is good
    if good:
        assert list(source.values) == [first.partition(":")[0].replace("-", "_")]


def test_duplicate_inside_a_dictionary() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.params\.lr is given twice"):
        _read("optimizer:\n  params:\n    lr: 1\n    lr: 2\n")


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("", "is empty", ""),
        ("- 1\n", "not a list of `key: value`", ""),
        ("a: 1\nb: [1, 2\nc: 3\n", "not valid YAML", ":3"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML", ":1"),
    ],
)
def test_bad_files_say_where(text: str, words: str, line: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        _read(text)
    assert str(caught.value.where).startswith(f"a.yml{line}")


_NINE = ",".join("*{0}" for _ in range(9))
_LETTERS = "abcdefghij"
LIST_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{_NINE.format(old)}]\n" for old, new in itertools.pairwise(_LETTERS)
)
MAP_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{{','.join(f'k{i}: *{old}' for i in range(9))}}}\n" for old, new in itertools.pairwise(_LETTERS)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LIST_BOMB, "values with all anchors expanded"),
        (MAP_BOMB, "values with all anchors expanded"),
        ("attention_config: &a [*a]", "an anchor contains itself"),
        ("a: {b: &b {c: *b}}", "an anchor contains itself"),
        ('a: !!bool "maybe"', "a value that its tag does not allow"),
        ("a: !!timestamp x", "a value that its tag does not allow"),
        ("a: !!int x", "not valid YAML"),
        ("a: !!omap 1", "not valid YAML"),
        ("a: " + "[" * 20_000, "not valid YAML"),
    ],
)
def test_bombs_and_bad_tags_are_refused_at_once(text: str, words: str) -> None:
    started = time.process_time()
    with pytest.raises(ConfigError, match=words):
        _read(text)
    with pytest.raises((yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError, TypeError)):
        parse_scalar(text)
    assert time.process_time() - started < 5


def test_anchors_of_usual_size_are_read() -> None:
    assert _read("a: &a {x: 1}\nb: *a\nc: [*a, *a]\n") == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}, {"x": 1}]}


def test_missing_file_names_near_ones(tmp_path: Path) -> None:
    (tmp_path / "metala.yml").write_text("a: 1\n")
    problems = Problems()
    read_files(["metla"], tmp_path, problems)
    assert "metala.yml" in problems.items[0].hint


def test_places_follow_nested_keys() -> None:
    _, places = parse_text("a-b: 1\noptimizer:\n  type: Adam\n  params: {lr: 1,\n    eps: 2}\n", "f.yml", Problems())
    assert places["a_b"] == "f.yml:1"
    assert places["optimizer.params.lr"] == "f.yml:4"
    assert places["optimizer.params.eps"] == "f.yml:5"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a", "d/a.yml"), ("a.yml", "d/a.yml"), ("a.json", "d/a.json"), ("1-3B", "d/1-3B.yml"), ("a.b", "d/a.b.yml")],
)
def test_suffix_and_folder(name: str, expected: str) -> None:
    assert resolve_path(name, "d") == Path(expected)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_spelling_is_a_number(value: float) -> None:
    for text in (repr(value), f"{value:e}", f"{value:E}", f"{value:.3g}"):
        assert parse_scalar(text) == float(text)


@given(st.integers())
def test_integers_stay_integers(value: int) -> None:
    assert parse_scalar(str(value)) == value
    assert isinstance(parse_scalar(str(value)), int)


@pytest.mark.slow
@given(st.text(max_size=40) | st.text(alphabet="a1:-{}[],&*\n '\"#!|>?.e0x_", max_size=40))
def test_any_text_gives_values_or_a_problem(text: str) -> None:
    problems = Problems()
    values, _ = parse_text(text, "a.yml", problems)
    assert values or problems.items or text.strip()


@pytest.mark.parametrize("text", ["a: 2024-99-99", "a: &x {b: *x}", "a: \x00", "a: 0b_", "[1]: 2", "a: " + "9" * 5000])
def test_odd_texts_do_not_escape(text: str) -> None:
    parse_text(text, "a.yml", Problems())


@given(st.text(alphabet="ab-_", min_size=1))
def test_normalising_twice_changes_nothing(key: str) -> None:
    assert normalise_key(normalise_key(key)) == normalise_key(key)


def test_a_second_setting_after_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--set a=1 b=2` reads b=2 as a file: the message says how it is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="config file not found(.|\n)*--set takes one setting: write --set lr=0.1"):
        load_config(["lr=0.1.yml"])
