"""Files of others: what is no regular file, too large, or JSON only to Python's parser is one error of a known kind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from megatron import files
from megatron.reliability.heartbeat import Heartbeat


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested too deep|nested deeper"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ("9" * 41, "a number of 41 digits"),
        ("-" + "9" * 5000, "a number of 5001 digits"),
        ('{"\\ud800": 1}', "half of a surrogate"),
        ('["\\uD83D"]', "half of a surrogate"),
        ("", "Expecting value"),
        ("{'a': 1}", "Expecting property name"),
    ],
)
def test_json_that_is_refused(text: str, says: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match=says):
            files.parse_json(given)


def test_json_that_is_read() -> None:
    assert files.parse_json('{"a": [1, -2, 0.5, null, true, "\\ud83d\\ude00"]}') == {
        "a": [1, -2, 0.5, None, True, "\U0001f600"]
    }
    assert files.parse_json("9" * 40) == int("9" * 40)
    assert files.parse_json("[" * 64 + "]" * 64)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """None of these waits for a writer or reads without end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_text("[1]\r\n")
    for name in ("pipe", "loop", "zero", ".", "none"):
        with pytest.raises(OSError):
            files.read_json(tmp_path / name)
        with pytest.raises(OSError):
            files.sha256_of(tmp_path / name)
    assert files.read_json(tmp_path / "link") == [1] and files.read_text(tmp_path / "link") == "[1]\r\n"
    with pytest.raises(ValueError, match="null byte"):
        files.read_bytes("a\0b")


def test_limits_and_encodings(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc\xff")
    assert files.read_bytes(tmp_path / "a", 4) == b"abc\xff"
    with pytest.raises(OSError, match="larger than 3 bytes"):
        files.read_bytes(tmp_path / "a", 3)
    with pytest.raises(ValueError, match="not UTF-8: byte 3 is 0xff"):
        files.read_text(tmp_path / "a")


def test_json_files_are_read_by_the_one_that_does_not_trust_them() -> None:
    """`json.loads` of a file's text breaks on nesting, and `read_text` waits for the writer of a pipe."""
    root = Path(__file__).parents[1]
    own = ("neox_files.py", "compatibility.py", "environments.py", "cross.py")  # files of ours
    for path in [*root.glob("*.py"), *root.glob("megatron/**/*.py"), *root.glob("tools/*.py")]:
        bad = re.search(r"json\.loads?\([^\n]*(read_text|read_bytes|open|handle)", path.read_text("utf-8"))
        assert bad is None or path.name in own, f"{path}: {bad}"


def test_a_datagram_of_anybody_is_no_beat() -> None:
    for data in (b"[" * 60_000, b'{"job":' + b"9" * 5000 + b"}", b"\xff", b"{}", b"[]"):
        assert Heartbeat.decode(data, "key") is None
