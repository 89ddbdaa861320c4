"""What wheel and sdist hold, and their commands in a new environment; another package called `megatron` in the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import megatron
from linear_neox import cli
from megatron.config.load import load_config
from megatron.shipped import shipped_root
from tests.tiny_run import losses, write_run

ROOT = Path(__file__).resolve().parents[2]


def test_every_command_names_a_file_of_the_checkout() -> None:
    for file, *_ in cli.COMMANDS.values():
        assert (ROOT / file).is_file(), file
    assert shipped_root() == ROOT


def test_words_become_the_command_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    root = str(ROOT)
    assert cli.command_line(["train", "a.yml"]) == [f"{root}/deepy.py", f"{root}/train.py", "a.yml"]
    assert cli.command_line(["data", "count", "--x"]) == [f"{root}/tools/data.py", "count", "--x"]
    assert cli.command_line(["launch", "eval.py", "a.yml"]) == [f"{root}/deepy.py", f"{root}/eval.py", "a.yml"]
    assert cli.command_line(["convert", "a"]) is None
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.command_line(["train", "a.yml"]) == [f"{root}/train.py", "a.yml"]


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ([], None, "linear-neox convert to-hf"),
        (["--version"], None, "linear-neox 0."),
        (["convert"], None, "from-neox"),
        (["data", "--help"], None, "linear-neox data tokenize"),
        (["trian"], 2, "no command 'linear-neox trian'"),
        (["convert", "to-gguf"], 2, "linear-neox convert from-hf"),
    ],
)
def test_words_without_a_command(words: list[str], code: int | None, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    if code is None:
        cli.run(words)
    else:
        with pytest.raises(SystemExit) as end:
            cli.run(words)
        assert end.value.code == code
    out = capsys.readouterr()
    assert shown in out.out + out.err


def test_a_shipped_configuration_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs/metala.yml", "metala", "configs/synthetics/mqar-quickstart.yml"):
        run = load_config([name], check=False)
        assert any("came with linear-neox" in line for line in run.warnings)
    assert load_config(["metala.yml"], conf_dir="configs", check=False).model.hidden_size == 1024
    (tmp_path / "metala.yml").write_text("hidden_size: 8\n")
    run = load_config(["metala.yml"], check=False)
    assert run.model.hidden_size == 8 and not any("came with" in line for line in run.warnings)


@pytest.mark.parametrize("layout", ["__init__.py", "core/__init__.py"])
def test_another_megatron_in_the_way_is_named(layout: str, tmp_path: Path) -> None:
    """GPT-NeoX's package has an `__init__`, Megatron-LM's is a namespace; ours comes later on the path, or not at all."""
    other = tmp_path / "megatron" / layout
    other.parent.mkdir(parents=True)
    other.write_text("")
    (tmp_path / "linear_neox").symlink_to(ROOT / "linear_neox")
    (tmp_path / "linear-neox").write_text("from linear_neox.cli import main\nmain()\n")
    seen = []
    for command in (["-c", "import linear_neox"], [str(tmp_path / "linear-neox"), "train"]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        seen.append(done)
        assert str(tmp_path / "megatron") in done.stderr and "PYTHONPATH" in done.stderr
        assert str(ROOT / "megatron") in done.stderr
    assert seen[0].returncode == 1 and "WrongMegatronError" in seen[0].stderr
    assert seen[1].returncode == 2 and "Traceback" not in seen[1].stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An sdist of this tree, and a wheel built from it: what the sdist lacks, the wheel lacks. Built in a copy of the tree."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    source.mkdir()
    for name in ("linear_neox", "megatron", "tools", "configs", "requirements", "benchmarks/published", "tests/linear_neox"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (
        *ROOT.glob("*.py"),
        *ROOT.glob("*.md"),
        *(ROOT / n for n in ("pyproject.toml", "MANIFEST.in", "LICENSE", "CITATION.cff")),
    ):
        shutil.copy(file, source)
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=300)
    (sdist,) = folder.glob("linear_neox-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "-w", str(folder), str(sdist)], check=True, capture_output=True, timeout=300)
    (wheel,) = folder.glob("linear_neox-*.whl")
    return {"sdist": sdist, "wheel": wheel}


def installed(distribution: Path, folder: Path) -> Path:
    """The `bin` of a new environment with the distribution and nothing else of this tree, without network.

    A `.pth` file lends it the packages of the environment that runs the tests (torch, ...; setuptools, which builds an sdist);
    `.pth` files in there are not read, so an editable install of the checkout does not come along.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--force-reinstall", "--ignore-installed"]
    done = subprocess.run([*pip, *options, str(distribution)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return python.parent


@pytest.mark.slow
def test_the_wheel_carries_all_that_a_user_needs(distributions: dict[str, Path]) -> None:
    names = set(zipfile.ZipFile(distributions["wheel"]).namelist())
    shipped = {name.removeprefix("megatron/shipped/") for name in names if name.startswith("megatron/shipped/")}
    for config in (ROOT / "configs").rglob("*.yml"):
        assert str(config.relative_to(ROOT)) in shipped
    assert {file for file, *_ in cli.COMMANDS.values()} | {"train.py", "benchmarks/published/scores.csv"} <= shipped
    data = {"megatron/config/neox_keys.tsv", "megatron/evaluation/tasks/based_fda.yaml"}
    assert {"linear_neox/py.typed", "megatron/py.typed", *data} <= names
    for path in (ROOT / "megatron").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"megatron", "linear_neox"}  # no `tools`, no `train` beside other people's packages


@pytest.mark.slow
def test_the_sdist_carries_what_belongs_to_a_release(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md", "CONTRIBUTING.md", "LICENSE", "setup.py"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yml")} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "requirements").glob("*.txt")} <= names
    assert not [name for name in names if name.startswith("tests/") or name.endswith(".pyc")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_distribution_trains(kind: str, distributions: dict[str, Path], tmp_path: Path) -> None:
    programs = installed(distributions[kind], tmp_path / "env")
    config = write_run(tmp_path / "run", train_iters=2, run_dir="out", save="out/checkpoints")

    def call(program: str, *words: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [str(programs / program), *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)

    done = call(
        "python", "-c", "import linear_neox as ln, megatron; print(ln.__version__, megatron.__file__, ln.Trainer.__name__)"
    )
    assert done.returncode == 0, done.stderr
    version, place, name = done.stdout.split()
    assert version == megatron.__version__ and Path(place).is_relative_to(tmp_path / "env") and name == "Trainer"
    done = call("linear-neox", "--help")
    assert done.returncode == 0 and "linear-neox convert to-hf" in done.stdout
    done = call("linear-neox", "train", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(losses(tmp_path / "out")) == {1, 2}
    if kind == "sdist":
        return
    done = call("linear-neox", "checkpoint", "inspect", "out")
    assert done.returncode == 0 and "global_step2" in done.stdout
    done = call(
        "linear-neox", "train", "configs/metala.yml", "--dry-run", "--set", "padded_vocab_size=50304"
    )  # 8: does not fit
    assert done.returncode in (0, 8) and "metala" in done.stdout, done.stdout + done.stderr
    done = call("linear-neox", "convert", "to-hf", "--checkpoint", "out/checkpoints")
    assert done.returncode == 2 and "usage: convert_to_hf.py" in done.stderr
