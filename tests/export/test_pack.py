"""The packer: right text, right order, and a refusal wherever a packed file would be wrong."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import ExportError
from megatron.export.hf import packed_sources
from megatron.export.pack import PackPlan, pack
from megatron.interop.hf_classes import LINEAR, METALA
from megatron.model.config import ModelConfig
from megatron.registry import layer_names


def plan(entry: str, **modules: str) -> PackPlan:
    """Pack `entry` of module `megatron.one` out of modules that exist as text only."""
    replaced = {f"megatron.{name}": text for name, text in modules.items()}
    return PackPlan((("megatron.one", entry),), "Title.", replaced)


def run(text: str, folder: Path) -> dict[str, Any]:
    """The names that a packed file defines."""
    (folder / "packed.py").write_text(text, encoding="utf-8")
    return runpy.run_path(str(folder / "packed.py"))


def test_needed_definitions_with_comments_in_order(tmp_path: Path) -> None:
    text = pack(
        plan(
            "top",
            one=(
                '"""About one."""\nimport math\nfrom megatron.two import helper\n\n# why top\n'
                "def top():\n    return helper() + math.pi\n\ndef unused():\n    return os\n"
            ),
            two=(
                '"""About two."""\nLIMIT = 3\n"""what limits"""\n\ndef helper():\n    return LIMIT\n\ndef other():\n    pass\n'
            ),
        )
    )
    assert text.index("def helper") < text.index("# why top") < text.index("def top")
    assert '"""what limits"""' in text and "# About two." in text and "import math" in text
    assert "unused" not in text and "other" not in text and "megatron.two import" not in text
    assert run(text, tmp_path)["top"]() == pytest.approx(6.14159, abs=1e-4)


def test_registered_definitions_come_along(tmp_path: Path) -> None:
    text = pack(
        plan(
            "run",
            one=(
                'from megatron.two import add, table\n\n@add("fast")\ndef fast():\n    return 1\n\n'
                'def run():\n    return table["fast"]()\n'
            ),
            two=(
                "table = {}\n\ndef add(name):\n    def keep(f):\n        table[name] = f\n        return f\n    return keep\n"
            ),
        )
    )
    assert run(text, tmp_path)["run"]() == 1


@pytest.mark.parametrize(
    ("one", "two", "word"),
    [
        (
            "from megatron.two import a\ndef b(): return 1\ndef top(): return a(), b()",
            "def b(): return 2\ndef a(): return b()",
            "meet",
        ),
        ("from megatron.two import a\ndef top(): return a()", "import math as F\ndef a(): return F", ""),
        ("import numpy\ndef top(): return numpy", "", "numpy"),
        ("def top():\n    from megatron.two import a\n    return a()", "def a(): return 1", "inside a definition"),
        ("def top(): return nowhere", "", "nowhere"),
        ("import megatron.two\ndef top(): return megatron", "", "cannot be packed"),
        ("from .two import a\ndef top(): return a", "", "relative"),
        ("from megatron.two import a as z\ndef top(): return z", "def a(): return 1", "another name"),
        ("print('hello')\ndef top(): return 1", "", "only define"),
        ("from megatron.two import gone\ndef top(): return gone", "def a(): return 1", "gone"),
    ],
)
def test_refusals(one: str, two: str, word: str) -> None:
    if not word:
        assert "import math as F" in pack(plan("top", one=one, two=two))
        return
    with pytest.raises(ExportError, match=word):
        pack(plan("top", one=one, two=two))


def test_one_name_for_two_packages() -> None:
    with pytest.raises(ExportError, match="two things"):
        pack(
            plan(
                "top",
                one="import math as F\nfrom megatron.two import a\ndef top(): return a(), F",
                two="import cmath as F\ndef a(): return F",
            )
        )


@pytest.mark.parametrize("family", [METALA, LINEAR], ids=lambda f: f.name)
def test_our_models_need_torch_and_transformers_only(family: object) -> None:
    """Every mixer of the project packs into one file together with every other one."""
    kinds = ("metala",) if family is METALA else tuple(layer_names())
    config = ModelConfig(64, 32, len(kinds), 2, 48, kinds)
    for name, text in packed_sources(config, family).items():  # type: ignore[arg-type]
        tops = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                tops |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                tops.add((node.module or "").split(".")[0])
        assert tops <= {"torch", "transformers"} | set(sys.stdlib_module_names), name
        assert "triton" not in tops
