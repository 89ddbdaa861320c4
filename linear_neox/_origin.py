"""Checks that `megatron` is this project's package: Megatron-LM and GPT-NeoX have a package of the same name.

`linear_neox` uses the sibling package `megatron`. If another one comes first on the path, an import deep inside would fail with
a missing name, so this is checked first, without imports.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

OWN_FOLDER = Path(__file__).resolve().parent.parent / "megatron"


class WrongMegatronError(ImportError):
    """The package `megatron` that Python finds is not the one that linear-neox was installed with."""


def _folders() -> list[str]:
    """The folders from which `megatron` is, or would be, imported; empty if there is none."""
    module = sys.modules.get("megatron")
    if module is not None:
        return [str(folder) for folder in getattr(module, "__path__", ())]
    spec = importlib.util.find_spec("megatron")
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _is_ours(folder: Path) -> bool:
    """Whether `folder` is the sibling package or that of another checkout: only ours has `assemble.py`."""
    return folder.resolve() == OWN_FOLDER or (folder / "assemble.py").is_file()


def check_megatron() -> None:
    """Raise a WrongMegatronError unless `megatron` is ours; the console command prints only its message."""
    try:
        _check()
    except WrongMegatronError as error:
        if Path(sys.argv[0]).name != "linear-neox":
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _check() -> None:
    folders = _folders()
    if folders and _is_ours(Path(folders[0])):
        return
    where = ", ".join(folders) if folders else "nowhere on sys.path"
    already = " (it is imported already)" if "megatron" in sys.modules else ""
    raise WrongMegatronError(
        "linear-neox needs its own package `megatron`, and Python finds another one\n"
        f"  where: {where}{already}\n"
        f"  why: Megatron-LM and GPT-NeoX have a package of that name too; linear-neox's is {OWN_FOLDER}\n"
        "  try: remove that folder from PYTHONPATH and the working directory, uninstall it, or use separate environments;"
        " in one process only one of them can be imported"
    )
