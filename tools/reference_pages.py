"""Writes the generated pages of the documentation: keys, commands, metrics, files, errors, exit codes, API, performance.

python tools/reference_pages.py            # `make docs` runs it
python tools/reference_pages.py --check    # name the pages that are stale; exit code 1 if there are any
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import exit_on_error
from tools.reference import api, commands, errors, keys, observed, performance

DOCS = Path(__file__).resolve().parents[1] / "docs"


def all_pages() -> dict[str, str]:
    """Path below docs/ -> text of every generated page."""
    parts = (keys, commands, observed, errors, api, performance)
    return {name: text for part in parts for name, text in part.pages().items()}


def stale(folder: Path, pages: dict[str, str]) -> list[str]:
    """Pages whose file is missing or has another text."""
    current = {name: folder / name for name in pages}
    return [name for name, path in current.items() if not path.is_file() or path.read_text(encoding="utf-8") != pages[name]]


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    pages = all_pages()
    names = stale(DOCS, pages)
    for name in names:
        if not args.check:
            (DOCS / name).parent.mkdir(parents=True, exist_ok=True)
            (DOCS / name).write_text(pages[name], encoding="utf-8")
        print(f"{'stale' if args.check else 'wrote'}: docs/{name}")
    return int(args.check and bool(names))


if __name__ == "__main__":
    with exit_on_error():
        sys.exit(main())
