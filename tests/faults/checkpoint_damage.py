"""Random damages to the files of a checkpoint: each must be named, and a resume must step back to the checkpoint before.

    python -m tests.faults.checkpoint_damage --count 1000 [--seed 5] [--output result.json]

Kinds: a flipped bit, a cut, zeroes, a longer file, a deletion, two stretches swapped, the same file of another save of the same
state. `damages` must name the file, and the tensor when the bytes were inside one; a resume must load the older checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import struct
import tempfile
from collections import Counter
from pathlib import Path

from megatron.checkpoint.layout import MANIFEST
from megatron.checkpoint.load import damages
from megatron.checkpoint.manifest import read_manifest
from megatron.checkpoint.resume import resume
from megatron.checkpoint.save import SaveOptions, save_checkpoint
from tests.checkpoint.fakes import MODEL, FakeEngine
from tests.faults.report import as_typed, store

KINDS = ("flip", "cut", "zero", "grow", "delete", "swap", "other")


def tensor_at(data: bytes, at: int) -> str | None:
    """The tensor that holds byte `at` of a good safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    for name, row in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__" and row["data_offsets"][0] <= at - 8 - length < row["data_offsets"][1]:
            return str(name)
    return None


class Damager:
    """A save folder with two checkpoints; the newer one is damaged and mended again and again."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng, self.folder = random.Random(seed), folder / "a"
        texts = {"a.yml": "x: 1\ny: 2\n"}
        save_checkpoint(self.folder, FakeEngine(seed=1), {"iteration": 7}, SaveOptions(model_config=MODEL, config_texts=texts))
        self.path = save_checkpoint(
            self.folder, FakeEngine(seed=2), {"iteration": 9}, SaveOptions(model_config=MODEL, config_texts=texts)
        )
        other = save_checkpoint(
            folder / "b", FakeEngine(seed=2), {"iteration": 9}, SaveOptions(model_config=MODEL, config_texts=texts)
        )
        self.good = {name: (self.path / name).read_bytes() for name in [*read_manifest(self.path).files, MANIFEST]}
        self.other = {name: (other / name).read_bytes() for name in self.good}

    def damaged(self, kind: str, name: str) -> tuple[bytes | None, int | None]:
        """(new content, None when the file goes; the first byte that differs)."""
        good = self.good[name]
        data, at = bytearray(good), self.rng.randrange(len(good))
        if kind == "delete":
            return None, None
        if kind == "other":
            data = bytearray(self.other[name])
        elif kind == "flip":
            data[at] ^= 1 << self.rng.randrange(8)
        elif kind == "cut":
            data = data[:at]
        elif kind == "grow":
            data += bytes(self.rng.randrange(1, 40))
        elif kind == "zero":
            data[at : at + 16] = bytes(len(data[at : at + 16]))
        else:
            to, size = self.rng.randrange(len(data)), self.rng.randrange(1, 64)
            low, high = sorted((at, to))
            size = min(size, high - low, len(data) - high)
            data[low : low + size], data[high : high + size] = data[high : high + size], data[low : low + size]
        differs = next((i for i, (a, b) in enumerate(zip(good, data, strict=False)) if a != b), None)
        return bytes(data), differs

    def one(self) -> tuple[str, str]:
        """Damage, look, mend; (kind, empty or what was not seen). A damage that changed no byte is drawn again."""
        while True:
            kind, name = self.rng.choice(KINDS), self.rng.choice(list(self.good))
            data, differs = self.damaged(kind, name)
            if data != self.good[name] and not self._harmless(name, data):
                break
        file = self.path / name
        if data is None:
            file.unlink()
        else:
            file.write_bytes(data)
        problem = self._seen(name, kind, differs)
        file.write_bytes(self.good[name])
        return kind, problem

    def _harmless(self, name: str, data: bytes | None) -> bool:
        """A blank of the manifest that became another blank says the same."""
        try:
            return name == MANIFEST and data is not None and bool(json.loads(data) == json.loads(self.good[name]))
        except ValueError:
            return False

    def _seen(self, name: str, kind: str, differs: int | None) -> str:
        found = damages(self.path)
        if not found or not any(Path(name).name in line for line in found):
            return f"{kind} of {name} was not named: {found}"
        tensor = tensor_at(self.good[name], differs) if differs is not None and name.endswith(".safetensors") else None
        if tensor and kind in ("flip", "zero", "swap") and not any(f"'{tensor}'" in line for line in found):
            return f"{kind} of {name} in {tensor} was not named by tensor: {found}"
        engine = FakeEngine(seed=3)
        state = resume(self.folder, engine).state
        text_file = not name.endswith(".safetensors") and name != MANIFEST  # no rank reads it at a resume
        expected = 9 if text_file else 7
        right = state["iteration"] == expected and engine.same_as(FakeEngine(seed=2 if text_file else 1))
        return "" if right else f"{kind} of {name}: resumed at {state['iteration']} or with other numbers"


def run(count: int, seed: int) -> dict[str, object]:
    """What was found over `count` damages."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        damager, kinds, unseen = Damager(Path(folder), seed), Counter[str](), list[str]()
        for _ in range(count):
            kind, problem = damager.one()
            kinds[kind] += 1
            if problem:
                unseen.append(problem)
        left = damages(damager.path)
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    named = count - len(unseen)
    return {"damages": count, "named, and stepped back": named, "kinds": dict(kinds), "not": unseen[:5], "left": left}


def main() -> None:
    """Damage as often as asked; exit code 1 when one was not seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON to put the count into")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # a line per resume
    found = run(args.count, args.seed)
    print(json.dumps(found, indent=1))
    store(args.output, "random damages", as_typed(__file__), found)
    raise SystemExit(bool(found["not"] or found["left"]))


if __name__ == "__main__":
    main()
