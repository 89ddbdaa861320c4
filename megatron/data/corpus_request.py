"""What is asked of a built-in corpus and what comes back; shared by the files that make them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILT_IN = ("pystdlib", "wikitext103", "enwik8")  # what `prepare_data.py` makes, each in a folder of its name


def command_that_makes(path: str | Path) -> str | None:
    """The command whose result `path` would be, None where it does not lie in the folder of a built-in corpus."""
    folder = Path(path).parent
    if folder.name not in BUILT_IN:
        return None
    place = "" if folder.parent == Path("data") else f" --data-dir {shlex.quote(str(folder.parent))}"
    return f"python prepare_data.py {folder.name}{place}"


@dataclass(frozen=True)
class CorpusRequest:
    """What the command line asks for.

    Attributes:
        data_dir: the corpus goes to `data_dir/NAME/`.
        tokenizer_type: None: the corpus brings its own tokenizer.
        vocab_file, merge_file: see `build_tokenizer`.
        force: make it again even if it is there.
        source: a local copy of a corpus that would be downloaded: its archive, file or folder.
    """

    data_dir: Path
    tokenizer_type: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    force: bool = False
    source: Path | None = None


@dataclass(frozen=True)
class PreparedCorpus:
    """What is there now: the paths a configuration needs, the receipt, and whether it was made by this call."""

    data_path: Path
    tokenizer_type: str
    vocab_file: Path | None
    merge_file: Path | None
    receipt: dict[str, Any]
    made: bool

    def yaml_lines(self) -> str:
        """Lines for a configuration file."""
        entries = {"data_path": self.data_path, "tokenizer_type": self.tokenizer_type}
        entries |= {"vocab_file": self.vocab_file, "merge_file": self.merge_file}
        return "\n".join(f'{key}: "{value}"' for key, value in entries.items() if value is not None)


@dataclass(frozen=True)
class PreparedSplits(PreparedCorpus):
    """A corpus whose makers say what is training, validation and test text; `data_path` is the folder."""

    def yaml_lines(self) -> str:
        """Lines for a configuration file."""
        lists = [f'{name}_data_paths: ["{self.data_path / f"{name}_text_document"}"]' for name in ("train", "valid", "test")]
        entries = {"tokenizer_type": self.tokenizer_type, "vocab_file": self.vocab_file, "merge_file": self.merge_file}
        return "\n".join([*lists, *(f'{key}: "{value}"' for key, value in entries.items() if value is not None)])
