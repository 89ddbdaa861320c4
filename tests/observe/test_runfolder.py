"""The run folder has one shape, is continued by a resume, and keeps a copy of the console."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.errors import ConfigError
from megatron.observe.runfolder import copy_console, create_run_folder

ROOT = Path(__file__).parents[2]


def test_shape(tmp_path: Path) -> None:
    run = create_run_folder(tmp_path / "a" / "run", "lr: 1\n", ["train.py", "my config.yml"])
    assert sorted(p.name for p in run.root.iterdir()) == ["command.txt", "config.yml", "logs"]
    assert run.command.read_text().endswith("train.py 'my config.yml'\n")
    assert run.metrics == run.root / "metrics.jsonl"
    again = create_run_folder(run.root, "lr: 1\n", ["train.py"])
    assert len(again.command.read_text().splitlines()) == 2
    create_run_folder(run.root, "lr: 2\n", ["train.py"])
    create_run_folder(run.root, "lr: 3\n", ["train.py"])
    assert [(run.root / n).read_text() for n in ("config.1.yml", "config.2.yml", "config.yml")] == [
        "lr: 1\n",
        "lr: 2\n",
        "lr: 3\n",
    ]


def test_log_dir_takes_metrics_and_logs(tmp_path: Path) -> None:
    run = create_run_folder(tmp_path / "run", "", ["x"], tmp_path / "logs")
    assert run.metrics == tmp_path / "logs" / "metrics.jsonl"
    assert run.logs == tmp_path / "logs"
    assert not (run.root / "logs").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be created"):
        create_run_folder(tmp_path / "file" / "run", "", ["x"])


def test_the_console_is_copied(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom megatron.observe.runfolder import copy_console\n"
        f"with copy_console({str(tmp_path)!r}):\n"
        "    print('to out'); print('to err', file=sys.stderr); assert not sys.stdout.isatty()\n"
        "print('after')\n"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout == "to out\nafter\n" and done.stderr == "to err\n"
    host = socket.gethostname()
    assert (tmp_path / f"{host}_stdout.txt").read_text() == "to out\n" * 2
    assert (tmp_path / f"{host}_stderr.txt").read_text() == "to err\n" * 2


def test_streams_are_given_back_after_an_error(tmp_path: Path) -> None:
    out = sys.stdout
    with pytest.raises(RuntimeError), copy_console(tmp_path):
        raise RuntimeError
    assert sys.stdout is out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_under_the_copies_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("stdout", "stderr"):
        (tmp_path / f"{socket.gethostname()}_{name}.txt").symlink_to("/dev/full")
    with copy_console(tmp_path):
        print("heard all the same")
    assert capsys.readouterr().out == "heard all the same\n"


def test_a_place_for_copies_that_is_none_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="the console cannot be copied"), copy_console(tmp_path / "file" / "logs"):
        pass


def test_a_config_that_is_no_text_is_kept_aside(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_bytes(b"\xff\xfe")
    create_run_folder(tmp_path, "a: 1\n", ["x"])
    assert (tmp_path / "config.1.yml").read_bytes() == b"\xff\xfe" and (tmp_path / "config.yml").read_text() == "a: 1\n"
