"""Rules of the architecture, read from the code: import circles, package order, forbidden calls, a torch-only import."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron"
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "linear_neox").rglob("*.py")])
COMMANDS = [ROOT / f"{n}.py" for n in ("deepy", "train", "generate", "eval", "prepare_data") if (ROOT / f"{n}.py").exists()]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(p): p for p in FILES}
# the composition root: knows parts and configuration
HIGH = ("megatron.assemble", "megatron.data_pipeline", "megatron.settings", "megatron.recipe", "megatron.resume_settings")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Every module a file imports, lazily or not, as full dotted names (`from a import b` gives both a and a.b)."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                stem = ".".join([*up, *([stem] if stem else [])])
            yield stem
            yield from (f"{stem}.{a.name}" for a in node.names)


def arrows() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports; a member naming its own package's __init__ is no arrow."""
    found = {}
    for name, path in MODULES.items():
        found[name] = {m for m in imported(path) if m in MODULES and m != name and not name.startswith(m + ".")}
    return found


def test_no_import_circles() -> None:
    graph, done = arrows(), set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, "import circle: " + " -> ".join([*way[way.index(name) :], name])
        if name in done:
            return
        for target in sorted(graph[name]):
            visit(target, (*way, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_packages_have_an_order() -> None:
    """A package that is built on another one is not imported by it, not even in another file; composition roots stand alone."""
    graph: dict[str, set[str]] = {}
    for name, targets in arrows().items():
        own = ".".join(name.split(".")[:2])
        graph.setdefault(own, set()).update({".".join(t.split(".")[:2]) for t in targets} - {own})

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, "packages in a circle: " + " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*way, name))
            done.add(name)

    done: set[str] = set()
    for name in sorted(graph):
        visit(name, ())


def test_one_door_to_deepspeed() -> None:
    doors = [module_of(p) for p in FILES + COMMANDS if any(m.split(".")[0] == "deepspeed" for m in imported(p))]
    assert doors == ["megatron.engine.deepspeed_pipeline"]


@pytest.mark.parametrize("path", sorted((PACKAGE / "layers").glob("*.py")), ids=lambda p: p.stem)
def test_layers_import_torch_the_contract_and_ops_only(path: Path) -> None:
    """Their text is packed into exported folders, where nothing else of this project exists."""
    allowed = ("torch", "megatron.layers.base", "megatron.ops", "__future__", "collections", "dataclasses", "typing", "math")
    for name in imported(path):
        assert name == "megatron.layers" or name.startswith(allowed), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE / "ops")))
def test_ops_import_torch_triton_and_ops_only(path: Path) -> None:
    allowed = ("torch", "triton", "megatron.ops", "__future__", "collections", "dataclasses", "typing", "math", "logging")
    allowed += ("functools", "importlib", "os", "json", "pathlib", "contextlib", "inspect")
    for name in imported(path):
        assert name.startswith(allowed), f"{path.name} imports {name}"


def test_nothing_below_imports_config_or_assemble() -> None:
    """Parts take plain values; only the composition root and the commands know the configuration."""
    for name, targets in arrows().items():
        if name in HIGH or name.startswith(("megatron.config", "linear_neox")):
            continue
        high = {t for t in targets if t.startswith(("megatron.config", "linear_neox")) or t in HIGH}
        assert not high, f"{name} imports {sorted(high)}"


PICKLE_READERS = {PACKAGE / "interop/neox_files.py", PACKAGE / "interop/weight_files.py"}
FORBIDDEN = {"eval", "exec", "os.system", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "pickle.load", "pickle.loads"}
LAST_WORDS = {name.rpartition(".")[2] for name in FORBIDDEN}


@pytest.mark.parametrize(
    "path", FILES + COMMANDS + sorted((ROOT / "tools").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_unsafe_calls(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            last = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = ast.unparse(node.func) if last in LAST_WORDS else last
            assert name not in FORBIDDEN, f"{path}:{node.lineno} {name}"
            assert name != "torch.load" or path in PICKLE_READERS, f"{path}:{node.lineno} torch.load"
            shell = any(
                k.arg == "shell" and not (isinstance(k.value, ast.Constant) and k.value.value is False) for k in node.keywords
            )
            assert not shell, f"{path}:{node.lineno} shell="
        assert not (isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)), (
            f"{path}:{node.lineno} star import"
        )
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}:{node.lineno} bare except"
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno} global"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is_for_and_stays_readable(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.name != "__init__.py" or lines:
        assert ast.get_docstring(tree_of(path)), f"{path} opens without a docstring"
    assert path.stem not in ("utils", "helpers", "common", "misc"), "a name that says nothing"
    assert len(lines) <= (400 if path.stem.endswith("_kernels") else 340), f"{path} has {len(lines)} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef) and not path.stem.endswith("_kernels"):  # a kernel cannot be cut up
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 70, f"{path}:{node.name} has {length} lines"


def test_import_works_without_torch_and_pulls_nothing_heavy() -> None:
    """`import megatron`, the registry and the configuration need neither torch nor deepspeed nor transformers."""
    code = (
        "import sys; import linear_neox, megatron, megatron.registry, megatron.config.load, megatron.launch.job;"
        "heavy = [m for m in ('torch', 'deepspeed', 'transformers', 'numpy') if m in sys.modules]; "
        "print(heavy); sys.exit(bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_model_runs_with_torch_alone() -> None:
    """Layers, ops and model import nothing but torch, so that a reader can use them with nothing installed."""
    blocked = ("deepspeed", "transformers", "pydantic", "yaml", "safetensors", "tokenizers", "numpy.testing")
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import torch\n"
        "from megatron.model.build import build_model\n"
        "from megatron.model.config import ModelConfig\n"
        "m = build_model(ModelConfig(32, 16, 1, 2, 24, ('metala',)))\n"
        "torch.nn.init.normal_(m.model.embed_tokens.weight)\n"
        "print(m(torch.zeros(1, 5, dtype=torch.long))[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Packages whose variables say what they hold (CONTRIBUTING.md, Style); add a package here once it is clean.
WELL_NAMED = ("megatron/data", "megatron/export", "megatron/evaluation", "megatron/observe", "megatron/layers", "linear_neox")
WELL_NAMED += ("megatron/serving", "megatron/model", "megatron/parallel", "megatron/engine")
PRIVATE_NAMES = {"found", "told", "wanted", "kept", "made", "said", "asked", "got"}


@pytest.mark.parametrize("package", WELL_NAMED)
def test_variables_say_what_they_hold(package: str) -> None:
    """A variable is named by its content, not by how it came about."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
            assert name not in PRIVATE_NAMES, f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)} {name}"


GENERATED_PAGES = {"neox.md", "keys.md", "compatibility.md"}
PRIVATE_PHRASES = ("to the bit", "for ever", "anew", "so many", "told apart", "of the house", "may be had", "goes on", "go on")
PRIVATE_PHRASES += (
    "as they stand",
    "stands in",
    "stand in",
    "lies in",
    "lie in",
    "stood still",
    "behind",
    "re-cut",
    "have the word",
)


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_pages_use_common_phrases(page: str) -> None:
    """Pages written by hand avoid phrases that are not the field's English; the glossary in CONTRIBUTING.md has its words."""
    if Path(page).name in GENERATED_PAGES:
        pytest.skip("generated")
    words = " ".join((ROOT / page).read_text(encoding="utf-8").lower().split())
    for phrase in PRIVATE_PHRASES:
        assert f" {phrase} " not in words, f"{page}: {phrase}"
