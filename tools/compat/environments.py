"""One virtual environment per combination, with every version written down before anything is installed.

uv makes them: it keeps each package once on the disk, so that an environment costs seconds and little space after the first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from megatron.errors import UserError
from tools.compat.combinations import CONSTRAINTS, OLDEST, REQUIREMENTS, ROOT, Combination

FOLDER = ROOT / ".venvs"


class NotAvailable(Exception):
    """A combination that this machine cannot have: no such Python, or no release for it. The text is the reason."""


def uv() -> str:
    """Path of the uv program, next to this interpreter or on PATH."""
    sibling = Path(sys.executable).with_name("uv")
    program = str(sibling) if sibling.exists() else shutil.which("uv")
    if program is None:
        raise UserError("uv is not installed", why="it makes the environments of the combinations", hint="make install-dev")
    return program


def python_program(version: str) -> str:
    """An interpreter of `version`, such as `3.12`.

    Returns:
        Its path: this one where it fits, else one on PATH, else one of pyenv.

    Raises:
        NotAvailable: there is none on this machine.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [sys.executable, shutil.which(f"python{version}")]
    candidates += sorted((str(p) for p in pyenv.glob(f"versions/{version}.*/bin/python")), reverse=True)
    for program in filter(None, candidates):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        process = subprocess.run([program, "-c", code], capture_output=True, text=True, check=False)
        if process.returncode == 0 and process.stdout.strip() == version:
            return program
    raise NotAvailable(f"no Python {version} on this machine")


def run_uv(*words: str) -> None:
    """Run uv quietly; a resolution without an answer is NotAvailable, with uv's own sentence.

    pip's find-links, where the environment names any, count for uv as well.
    """
    environment = dict(os.environ)
    if "PIP_FIND_LINKS" in environment:
        environment.setdefault("UV_FIND_LINKS", environment["PIP_FIND_LINKS"])
    command = [uv(), *words, "--quiet", "--no-python-downloads"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotAvailable(" ".join(done.stderr.split()) or f"uv {words[0]} ended with {done.returncode}")


def beyond_its_range(name: str, version: str) -> bool:
    """Whether requirements.txt does not admit a release of `name`."""
    lines = (ROOT / REQUIREMENTS[0]).read_text(encoding="utf-8").splitlines()
    stated = [Requirement(line.partition("#")[0]) for line in lines if line and not line.startswith("#")]
    return not any(r.name == name and r.specifier.contains(version) for r in stated)


def write_versions(combination: Combination, file: Path, program: str) -> None:
    """Write the exact version of every package of a combination.

    All others than `torch` and `transformers` keep the version of their rule unless those two forbid it. A release beyond the
    range of requirements.txt replaces the range, so that it can be tried before the range is moved.

    Args:
        combination: the combination.
        file: where the versions go, in the form of a requirements file.
        program: the interpreter they are for.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    if combination.others != "newest":
        lines = (
            (ROOT / (OLDEST if combination.others == "oldest" else CONSTRAINTS)).read_text(encoding="utf-8").splitlines(True)
        )
        pinned_lines = [line for line in lines if not line.startswith("torch==")]  # a local CPU build may serve instead
        file.write_text("".join(pinned_lines), encoding="utf-8")
    pins = {"torch": combination.torch, "transformers": combination.transformers}
    stated: dict[str, list[str]] = {"constraints": [], "overrides": []}
    for name, version in pins.items():
        stated["overrides" if beyond_its_range(name, version) else "constraints"].append(f"{name}=={version}")
    words = ["--resolution", "lowest-direct"] if combination.others == "oldest" else []
    with tempfile.TemporaryDirectory() as folder:
        for kind, lines in stated.items():
            requirements_file = Path(folder) / f"{kind}.txt"
            requirements_file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            words += [f"--{kind}", str(requirements_file)]
        run_uv("pip", "compile", *REQUIREMENTS, *words, "--python", program, "--no-annotate", "--no-header", "-o", str(file))


def python_of(environment: Path) -> str:
    """The interpreter of an environment."""
    return str(environment / "bin" / "python")


def make_environment(combination: Combination) -> Path:
    """The environment of a combination, made or brought up to date.

    Returns:
        Its folder under `.venvs/`.

    Raises:
        NotAvailable: no such Python here, or the packages do not go together.
    """
    program = python_program(combination.python)
    place, versions = FOLDER / combination.name, FOLDER / f"{combination.name}.txt"
    write_versions(combination, versions, program)
    if not Path(python_of(place)).exists():
        run_uv("venv", "--python", program, str(place))
    run_uv("pip", "sync", "--python", python_of(place), str(versions))
    return place


def remove_environment(combination: Combination) -> None:
    """Delete a combination's environment; what uv keeps for others stays in its own cache."""
    shutil.rmtree(FOLDER / combination.name, ignore_errors=True)


def installed(environment: Path) -> dict[str, str]:
    """Name -> version of every package in an environment."""
    done = subprocess.run(
        [uv(), "pip", "list", "--quiet", "--format", "json", "--python", python_of(environment)],
        capture_output=True,
        text=True,
        check=True,
    )
    return {row["name"].lower(): row["version"] for row in json.loads(done.stdout)}
