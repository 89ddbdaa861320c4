"""Mutations of valid files: bytes, JSON and YAML values, safetensors headers, and what stands in a file's place."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUMBERS = (0, -1, 1, 2, 255, 65_536, 10**9, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e-300, 1e308, float("nan"))
TEXTS = (
    "",
    " ",
    "x",
    "None",
    "nonsense",
    "../x",
    "/etc/hostname",
    "a\0b",
    "\ud800",
    "\u0661",
    "é" * 300,
    "%s%n",
    "9" * 5000,
    "a.b.c",
)
BYTES = (b"", b"\0", b"\xff", b"\x80", b"\r", b"\n", b"\xef\xbb\xbf", b"{", b"[", b'"', b"&a *a", b"!!python/object:os.system")
NAMES = ("latest", "manifest.json", "config.json", "model.safetensors")


def value(rng: random.Random) -> Any:
    """A value that nobody writes."""
    return rng.choice(
        (
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(TEXTS),
            lambda: rng.choice((None, True, False, [], {}, [[]], [None], {"a": None}, {"": {}})),
            lambda: rng.randrange(-5, 300),
            lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(TEXTS): rng.choice(NUMBERS)},
            lambda: _nested(rng.choice((5, 70, 500))),
        )
    )()


def _nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside, containers first."""
    found, level = [], [tree]
    while level:
        here = level.pop()
        for key in list(here) if isinstance(here, dict) else range(len(here)):
            found.append((here, key))
            if isinstance(here[key], dict | list):
                level.append(here[key])
    return found


def tree(rng: random.Random, content: Any) -> Any:
    """A JSON value with one to three changes."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = nodes(content) if isinstance(content, dict | list) else []
        if not places or rng.random() < 0.02:
            content = value(rng)
            continue
        here, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del here[key]
        elif kind == 1 and isinstance(here, dict):
            here[rng.choice(TEXTS)] = here.pop(key)
        elif kind == 2:
            there, other = rng.choice(places)
            here[key] = _copy(there[other] if not isinstance(there, dict) or other in there else None)
        elif kind == 3 and isinstance(here, list):
            here.insert(key, json.loads(json.dumps(here[key], skipkeys=True)) if _plain(here[key]) else value(rng))
        else:
            here[key] = value(rng)
    return content


def _copy(part: Any) -> Any:
    """A copy, so that no value contains itself; a value that is nested too deep for Python to copy becomes None."""
    try:
        return copy.deepcopy(part)
    except RecursionError:
        return None


def _plain(part: Any) -> bool:
    return not isinstance(part, dict | list)


def text_of(content: Any) -> bytes:
    """As JSON; what JSON cannot hold is left to Python's dialect."""
    try:
        return json.dumps(content).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b"[" * 300 + b"]" * 300


def data(rng: random.Random, content: bytes) -> bytes:
    """Bytes with one to four changes."""
    made = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(made) + 1)
        kind, size = rng.randrange(9), rng.choice((1, 1, 2, 4, 8, 64, 1000))
        if kind == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            made[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del made[at : at + size]
        elif kind == 3:
            made[at:at] = rng.choice(BYTES) * rng.choice((1, 1, 3, 2000))
        elif kind == 4:
            del made[at:]
        elif kind == 5:
            made[at : at + size] = bytes(size)
        elif kind == 6:
            made[at:at] = made[max(0, at - size) : at] * rng.choice((1, 2, 300))
        elif kind == 7:
            made[at : at + 8] = struct.pack("<q", rng.choice([n for n in NUMBERS if isinstance(n, int) and abs(n) < 2**63]))
        else:
            made[at:at] = str(rng.choice(NUMBERS + TEXTS)).encode("utf-8", "surrogatepass")
    return bytes(made)


def header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header, its length right or not."""
    size = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else 0
    try:
        made = text_of(tree(rng, json.loads(content[8 : 8 + size])))
    except ValueError:
        return data(rng, content)
    length = rng.choice((len(made), len(made), len(made), len(made) + 8, 0, 2**40, 2**64 - 1))
    return struct.pack("<Q", length) + made + content[8 + size :]


def instead(rng: random.Random, path: Path) -> None:
    """Something else under the file's name."""
    content = path.read_bytes()
    path.unlink()
    made: tuple[Callable[[], Any], ...] = (
        lambda: None,
        lambda: os.mkfifo(path),
        path.mkdir,
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.write_bytes(b""),
        lambda: path.rename(path) if path.exists() else (path.with_name(rng.choice(NAMES))).write_bytes(content),
    )
    try:
        rng.choice(made)()
    except OSError:
        shutil.rmtree(path, ignore_errors=True)


def folder(rng: random.Random, root: Path, resign: Callable[[Path], None] | None = None) -> None:
    """Change one file (seldom two) of a folder of seeds.

    Args:
        resign: makes checksums right after a structured change, so that what is behind them is reached.
    """
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2)))):
        kind = rng.random()
        if kind < 0.04:
            instead(rng, path)
        elif kind < 0.6 and path.suffix in (".json", ".yml"):
            try:
                path.write_bytes(text_of(tree(rng, json.loads(path.read_bytes()))))
            except ValueError:
                path.write_bytes(data(rng, path.read_bytes()))
            if resign is not None and rng.random() < 0.9:
                resign(path)
        elif kind < 0.6 and path.suffix == ".safetensors":
            path.write_bytes(header(rng, path.read_bytes()))
        else:
            path.write_bytes(data(rng, path.read_bytes()))
