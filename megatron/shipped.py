"""Locates the commands and configurations: in the checkout, or in `megatron/shipped/` of an installed wheel.

A wheel contains the checkout's `configs/`, `tools/` and commands (`train.py`, `deepy.py`, ...) in one folder with the same
layout, so that a path such as `tools/convert_to_hf.py` is valid in both. `setup.py` fills it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped_root() -> Path:
    """The folder that holds `configs/`, `tools/` and the commands."""
    packed = PACKAGE / "shipped"
    return packed if packed.is_dir() else PACKAGE.parent


def shipped_config(path: Path) -> Path | None:
    """The shipped configuration of a relative path (`configs/metala.yml` or `metala.yml`), None if there is none."""
    if path.is_absolute() or ".." in path.parts:
        return None
    inner = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    file = shipped_root() / "configs" / inner
    return file if file.is_file() else None
