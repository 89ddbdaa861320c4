"""The generated pages of the documentation are fresh and complete: no key, command, metric, exit code or name is missing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from linear_neox import HOMES
from linear_neox.cli import COMMANDS
from megatron import errors as user_errors
from megatron import registry
from megatron.config.catalog import catalog
from megatron.launch.runners import _EXIT_REASONS
from megatron.reliability import heartbeat, stop
from tests.commands import run_here
from tools.reference import api, commands, errors, keys, messages, observed, performance
from tools.reference.markdown import prose, table
from tools.reference_pages import stale

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
STALE = "run: make docs"


@pytest.mark.parametrize("part", [keys, observed, performance], ids=lambda part: str(part.__name__.rpartition(".")[2]))
def test_pages_are_fresh(part: object) -> None:
    assert stale(DOCS, part.pages()) == [], STALE  # type: ignore[attr-defined]


@pytest.mark.slow
def test_all_pages_are_fresh() -> None:
    done = run_here("tools/reference_pages.py", "--check")
    assert (done.returncode, done.stdout) == (0, ""), f"{done.stdout}{done.stderr}\n{STALE}"


def test_a_page_that_is_missing_or_altered_is_stale(tmp_path: Path) -> None:
    (tmp_path / "same.md").write_text("text\n")
    (tmp_path / "altered.md").write_text("other\n")
    assert stale(tmp_path, {"same.md": "text\n", "altered.md": "text\n", "missing.md": "text\n"}) == [
        "altered.md",
        "missing.md",
    ]


@pytest.fixture(scope="module")
def error_pages() -> dict[str, str]:
    return errors.pages()


def test_every_key_has_an_entry_and_a_link() -> None:
    texts, index = keys.pages(), keys.pages()["reference/keys/index.md"]
    for key, info in catalog().items():
        page = texts[f"reference/keys/{info.section or keys.OTHER}.md"]
        assert (f"### `{key}`\n" in page) if info.section else (f"`{key}`" in page), key
        assert not info.section or f"[`{key}`]({info.section}.md#{key})" in index, key


def test_bounds_and_refused_values_of_a_key_are_said() -> None:
    texts = keys.pages()
    assert "**Type:** a whole number, at least 0. **Default:** `1`. A key of GPT-NeoX." in texts["reference/keys/parallel.md"]
    assert "Refused values: " in texts["reference/keys/model.md"] and "Not in GPT-NeoX." in texts["reference/keys/layers.md"]


def test_every_command_is_on_the_page() -> None:
    listed = {script for scripts in commands.groups().values() for script in scripts}
    named = {command[0] for command in COMMANDS.values()} | {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    named |= {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")}
    assert named <= listed and all((ROOT / script).is_file() for script in listed)
    text = (DOCS / "reference/commands.md").read_text(encoding="utf-8")
    for script in listed:
        assert f"### `{script}`\n" in text
    for words in COMMANDS:
        assert f"`linear-neox {' '.join(words)}`" in text


def test_every_exit_code_is_on_the_page() -> None:
    codes = {cls.exit_code for cls in messages.CLASSES.values()} | set(_EXIT_REASONS)
    codes |= {value for module in (heartbeat, stop) for name, value in vars(module).items() if name.startswith("EXIT_")}
    assert codes <= set(errors.CODES)
    assert {cls for cls in messages.CLASSES.values() if "exit_code" in vars(cls)} == set(errors.PAGES)


SOURCE = """
LIMIT = "a limit"

def check(count, name):
    reason = "not this one"
    if count:
        reason = f"{count} are too many"
        raise ConfigError(f"{name.strip()} is wrong", why=reason, hint="try less" if name else None)
    message = "first"
    yield Violation(("key",), message, LIMIT)
    message = f"second of {len(name)}"
    yield Violation(("key",), message)
    problems.add("third", place, hint=", ".join(x for x in name))
    raise DataError(str(name))
"""


def test_messages_of_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names stand for what was assigned last on the way to a message; what has no word of its own is left out."""
    (tmp_path / "source.py").write_text(SOURCE)
    monkeypatch.setattr(messages, "ROOT", tmp_path)
    found = [(m.cls, m.what, m.why, m.hint) for m in messages.messages()]
    assert found == [
        ("ConfigError", ("{name} is wrong",), ("{count} are too many",), ("try less",)),
        ("ConfigError", ("first",), (), ("a limit",)),
        ("ConfigError", ("second of {name}",), (), ()),
        ("ConfigError", ("third",), (), ()),
    ]


@pytest.mark.slow
def test_no_message_of_the_source_is_missing_from_its_page(error_pages: dict[str, str]) -> None:
    """Every raise with a text of its own; what passes on the text of another error has none."""
    total = 0
    for path in messages.sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name not in messages.CLASSES or not node.args or not isinstance(node.args[0], ast.Constant):  # type: ignore[attr-defined]
                continue
            home = errors.PAGES[errors._home(messages.CLASSES[name])][0]
            text = errors._escaped(node.args[0].value)  # type: ignore[attr-defined]
            assert text in error_pages[f"reference/errors/{home}.md"], f"{path.name}: {text}"
            total += 1
    assert total > 200


def test_a_message_reads_as_it_is_printed() -> None:
    assert errors._escaped("`a_b` of {file_name}: [x] < 3 * {...}") == "`a_b` of *file\\_name*: \\[x\\] &lt; 3 \\* *...*"
    assert prose("a <b> `c <d>` *e*") == "a &lt;b> `c <d>` \\*e\\*"
    assert table(("a", "b"), [("1 | 2", "x\ny")]) == "| a | b |\n| --- | --- |\n| 1 \\| 2 | x y |\n"


def test_every_public_name_and_operator_is_in_the_reference_of_the_api() -> None:
    texts = api.pages()
    for name, module in HOMES.items():
        known = f"::: {module}.{name}\n", f"[`{module}.{name}`]"
        assert any(part in text + "\n" for part in known for text in texts.values()), name
    operators = texts["reference/api/operators.md"]
    for package in (ROOT / "megatron/ops").glob("*/__init__.py"):
        doc, names = api.exported(package.parent)
        assert names and f"## {package.parent.name}\n\n{doc}" in operators
        assert all(f"::: {name}\n" in operators for name in names)
    assert "::: megatron.ops.modules\n" in operators and re.search(r"\| `metala` \| yes \| yes \| yes \| yes \|", operators)


def test_every_mixer_is_in_the_reference_of_the_api() -> None:
    text = api.pages()["reference/api/mixers.md"]
    for name in registry.layer_names():
        info = registry.layer_info(name)
        assert f"`{name}`" in text and f"::: {info.module}.{info.class_name}\n" in text


@pytest.mark.slow
def test_messages_of_a_class_without_a_page_are_with_its_base(error_pages: dict[str, str]) -> None:
    assert errors._home(user_errors.DamagedCheckpoint) is user_errors.CheckpointError
    assert "`DamagedCheckpoint`, exit code 4" in error_pages["reference/errors/checkpoint.md"]
