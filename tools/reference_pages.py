"""Writes the generated pages of the documentation: keys, commands, metrics, files, errors, exit codes, API, performance.

python tools/reference_pages.py            # all pages; `make docs` runs it
python tools/reference_pages.py keys api   # the pages of these parts
python tools/reference_pages.py --check    # name the pages that are stale; exit code 1 if there are any
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import exit_on_error

DOCS = Path(__file__).resolve().parents[1] / "docs"
PARTS = ("keys", "commands", "observed", "errors", "api", "performance")


def texts_of(parts: Sequence[str]) -> dict[str, str]:
    """Path below docs/ -> text of every page of these parts."""
    modules = [importlib.import_module(f"tools.reference.{part}") for part in parts]
    return {name: text for module in modules for name, text in module.pages().items()}


def stale(folder: Path, pages: dict[str, str]) -> list[str]:
    """Pages whose file is missing or has another text."""
    current = {name: folder / name for name in pages}
    return [name for name, path in current.items() if not path.is_file() or path.read_text(encoding="utf-8") != pages[name]]


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them by default")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    pages = texts_of(args.parts or PARTS)
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
