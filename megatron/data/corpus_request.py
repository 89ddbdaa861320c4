"""The request for a built-in corpus and its result; shared by the modules that build them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILT_IN = ("pystdlib", "wikitext103", "enwik8")  # built by `prepare_data.py`, each in a folder of its name


def prepare_command(path: str | Path) -> str | None:
    """The command that produces `path`; None if `path` is not in the folder of a built-in corpus."""
    folder = Path(path).parent
    if folder.name not in BUILT_IN:
        return None
    data_dir_option = "" if folder.parent == Path("data") else f" --data-dir {shlex.quote(str(folder.parent))}"
    return f"python prepare_data.py {folder.name}{data_dir_option}"


@dataclass(frozen=True)
class CorpusRequest:
    """The request, as given on the command line.

    Attributes:
        data_dir: parent folder; the corpus is written to `data_dir/NAME/`.
        tokenizer_type: tokenizer of the corpus; None: the corpus's own.
        vocab_file: see `build_tokenizer`.
        merge_file: see `build_tokenizer`.
        force: rebuild the corpus even if it exists.
        source: local copy (archive, file or folder) of a corpus that would otherwise be downloaded.
    """

    data_dir: Path
    tokenizer_type: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    force: bool = False
    source: Path | None = None


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus on disk.

    Attributes:
        data_path: prefix of the token files.
        tokenizer_type: tokenizer of the corpus.
        vocab_file: its vocabulary, None if it has no file.
        merge_file: its merges, None if it has no file.
        receipt: what `receipt.json` records: counts, digests, versions.
        created: this call built it (False: it existed).
    """

    data_path: Path
    tokenizer_type: str
    vocab_file: Path | None
    merge_file: Path | None
    receipt: dict[str, Any]
    created: bool

    def yaml_lines(self) -> str:
        """Lines for a configuration file."""
        entries = {"data_path": self.data_path, "tokenizer_type": self.tokenizer_type}
        entries |= {"vocab_file": self.vocab_file, "merge_file": self.merge_file}
        return "\n".join(f'{key}: "{value}"' for key, value in entries.items() if value is not None)


@dataclass(frozen=True)
class PreparedSplits(PreparedCorpus):
    """A corpus with official training, validation and test splits; `data_path` is its folder."""

    def yaml_lines(self) -> str:
        """Lines for a configuration file."""
        lists = [f'{name}_data_paths: ["{self.data_path / f"{name}_text_document"}"]' for name in ("train", "valid", "test")]
        entries = {"tokenizer_type": self.tokenizer_type, "vocab_file": self.vocab_file, "merge_file": self.merge_file}
        return "\n".join([*lists, *(f'{key}: "{value}"' for key, value in entries.items() if value is not None)])
