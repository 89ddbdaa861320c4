"""Whether `megatron` is this project's package: Megatron-LM and GPT-NeoX have one of the same name.

`linear_neox` stands on the package `megatron` that lies beside it. When another one comes first on the path, imports would fail
deep inside with a name that is missing, so this is checked at once. Nothing is imported for it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

BESIDE = Path(__file__).resolve().parent.parent / "megatron"


class WrongMegatronError(ImportError):
    """The package `megatron` that Python finds is not the one that linear-neox was installed with."""


def _folders() -> list[str]:
    """Where the package `megatron` is, or would be, loaded from; empty where there is none."""
    module = sys.modules.get("megatron")
    if module is not None:
        return [str(folder) for folder in getattr(module, "__path__", ())]
    spec = importlib.util.find_spec("megatron")
    return [] if spec is None else list(spec.submodule_search_locations or ())


def _is_ours(folder: Path) -> bool:
    """The one beside this package, or another checkout's: ours has this file, Megatron-LM and GPT-NeoX do not."""
    return folder.resolve() == BESIDE or (folder / "assemble.py").is_file()


def check_megatron() -> None:
    """Raise WrongMegatronError unless `megatron` is ours; the console command ends with its message alone."""
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
        f"  why: Megatron-LM and GPT-NeoX have a package of that name too; linear-neox's is {BESIDE}\n"
        "  try: take that folder out of PYTHONPATH and of the working directory, uninstall it, or use an environment for each;"
        " in one process only one of them can be imported"
    )
