"""Where the commands and the configurations lie: in the checkout, or in `megatron/shipped/` of an installed wheel.

A wheel carries the checkout's `configs/`, `tools/` and commands (`train.py`, `deepy.py`, ...) in one folder, laid out as in the
checkout, so that a path such as `tools/convert_to_hf.py` means the same file in both. `setup.py` fills it.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped_root() -> Path:
    """The folder that holds `configs/`, `tools/` and the commands."""
    packed = PACKAGE / "shipped"
    return packed if packed.is_dir() else PACKAGE.parent


def shipped_config(path: Path) -> Path | None:
    """The configuration of ours that a relative path names (`configs/metala.yml`, or `metala.yml` alone), None without one."""
    if path.is_absolute() or ".." in path.parts:
        return None
    inner = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    file = shipped_root() / "configs" / inner
    return file if file.is_file() else None
