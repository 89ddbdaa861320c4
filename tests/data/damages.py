"""Damages of every kind to a small corpus and its text, and the verdict: named, contained, harmless, or what went wrong."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megatron.data.encode import EncodeJob, EncodeOptions, encode_corpus
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.inspect_corpus import verify
from megatron.data.readers import RowReader, check_sums, expand_inputs
from megatron.data.rows import row_texts
from megatron.errors import DataError
from megatron.files import sha256_of

HAVE_ARROW = find_spec("pyarrow") is not None
CollectiveError = str  # "named", "contained", "harmless"; anything else describes what went wrong


class Bench:
    """A healthy set of files in `folder`, and a second corpus to swap files with.

    `text.jsonl`, `text.parquet`, `good.bin/.idx` (with checksums and record), `plain.bin/.idx` (without them), `other.*`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        dice = random.Random(5)
        self.texts = ["".join(dice.choices("abcdefg hij\n", k=dice.randrange(1, 80))) for _ in range(120)]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts))
        self.files = ["text.jsonl"]
        if HAVE_ARROW:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.Table.from_pylist([{"text": text} for text in self.texts])
            pq.write_table(table, folder / "text.parquet", row_group_size=50, write_page_checksum=True)
            self.files.append("text.parquet")
        sums = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in self.files)
        (folder / "SHA256SUMS").write_text(sums)
        job = EncodeJob("CharLevelTokenizer", append_eod=True)
        encode_corpus(job, [str(folder / "text.jsonl")], str(folder / "good"), EncodeOptions())
        for suffix in ("bin", "idx"):
            for name in ("good", "plain"):
                shutil.copyfile(folder / f"good_text_document.{suffix}", folder / f"{name}.{suffix}")
        for suffix in ("meta", "sums"):
            shutil.copyfile(folder / f"good_text_document.{suffix}.json", folder / f"good.{suffix}.json")
        with IndexedWriter(folder / "other", "uint16") as writer:  # the same lengths, other tokens
            for text in self.texts:
                writer.add_document([99] * (len(text) + 1))
        self.corpus = [IndexedDataset(folder / "good").get(i).tolist() for i in range(len(self.texts))]
        self.boundaries = IndexedDataset(folder / "good").doc_idx.tolist()

    def try_one(self, seed: int, scratch: Path) -> tuple[str, CollectiveError]:
        """(what was done to which file, the verdict)."""
        dice = random.Random(seed)
        # Parquet comes half as often: each reading starts a process.
        kinds = ["good.bin", "good.idx", "plain.idx", "good.sums.json", "good.meta.json", "text.jsonl"] * 2 + self.files[1:]
        name = dice.choice(kinds)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(self.folder, scratch)
        path = scratch / name
        how = _damage(path, dice, self.folder)
        if path.exists() and path.read_bytes() == (self.folder / name).read_bytes():
            return f"{how} of {name}", "harmless"
        try:
            verdict = self._judge(name, scratch)
        except DataError as error:
            near = path.name.split(".")[0]
            verdict = "named" if near in str(error.where) else f"named without its place: {error}"
        except Exception as error:  # anything else is a crash, which is what is looked for
            verdict = f"crash: {type(error).__name__}: {error}"
        return f"{how} of {name}", verdict

    def _judge(self, name: str, scratch: Path) -> CollectiveError:
        if name.startswith("text"):
            return self._judge_text(scratch / name, scratch)
        prefix = str(scratch / name.split(".")[0])
        verify(prefix)
        read = IndexedDataset(prefix)
        same = [read.get(i).tolist() for i in range(len(read))] == self.corpus
        # Without checksums a boundary of a document may move: training does not look at it.
        moved = read.doc_idx.tolist() != self.boundaries
        return ("contained" if moved else "harmless") if same else "silent: other tokens"

    def _judge_text(self, path: Path, scratch: Path) -> CollectiveError:
        """Without checksums only rows may be lost or changed that were hit; with them every damage is named."""
        sources = expand_inputs([str(path)])
        found: list[str | None] = []
        unplaced = 0
        try:
            for row in RowReader(sources):
                try:
                    found.append(row_texts(row, ["text"])[0])
                except DataError as error:
                    found.append(None)
                    unplaced += str(path) not in str(error.where)
        except DataError as error:
            unplaced += str(path) not in str(error.where)
            found = []
        if unplaced:
            return "named without its place"
        try:
            check_sums(sources, scratch / "SHA256SUMS")
        except DataError as error:
            return "named" if str(path) in str(error.where) else "named without its place"
        return "harmless" if found == self.texts else "silent: other text"


def _damage(path: Path, dice: random.Random, healthy: Path) -> str:
    data = bytearray(path.read_bytes())
    how = dice.choice(["flip", "flip", "flip", "cut", "swap", "dtype", "header", "noise", "longer", "missing"])
    actions: dict[str, Callable[[], bytes]] = {
        "cut": lambda: bytes(data[: dice.randrange(len(data))]),
        "swap": lambda: _other(path, healthy),
        "longer": lambda: bytes(data) + dice.randbytes(dice.choice([1, 2, 8, 100])),
    }
    if how == "missing":
        path.unlink()
        return how
    if how in actions:
        path.write_bytes(actions[how]())
        return how
    if how == "flip":
        for _ in range(dice.choice([1, 1, 3])):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif how == "noise":
        at = dice.randrange(len(data))
        data[at : at + 16] = dice.randbytes(len(data[at : at + 16]))
    elif how == "dtype" and path.suffix == ".idx":
        data[17] = dice.randrange(256)
    else:  # a header that promises too much, or whatever stands there in other files
        at = dice.choice([9, 18, 26]) if path.suffix == ".idx" else dice.randrange(max(1, len(data) - 8))
        data[at : at + 8] = struct.pack("<Q", dice.choice([0, 1, 2**31, 2**40, 2**62, 2**64 - 1]))
    path.write_bytes(data)
    return how


def _other(path: Path, healthy: Path) -> bytes:
    """The file of another corpus, or of another kind."""
    swap = {"good.bin": "other.bin", "good.idx": "text.jsonl", "plain.idx": "other.bin", "good.sums.json": "good.meta.json"}
    return (healthy / swap.get(path.name, "good.idx")).read_bytes()
