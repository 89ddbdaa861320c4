"""Commands whose streams are closed, lost or on a full disk: no traceback, the work is done, the code says what was lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_forked, run_here
from tests.tiny_run import write_run

ROOT = Path(__file__).resolve().parents[1]
FILES = {p: p.read_text("utf-8") for p in (*ROOT.glob("*.py"), *(ROOT / "tools").rglob("*.py"))}
COMMANDS = sorted(p for p, text in FILES.items() if "exit_on_error(" in text and '__name__ == "__main__"' in text)
FULL = Path("/dev/full")


def start(command: list[str], out: str = "kept", err: str = "kept", stdin: str = "empty") -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a stream is `kept`, `closed`, `gone` (a pipe that nobody reads) or `full` (a disk)."""
    redirections = {"closed": "&-", "full": "/dev/full"}
    words = "".join(f" {fd}>{redirections[kind]}" for fd, kind in (("1", out), ("2", err)) if kind in redirections)
    words += " <&-" if stdin == "closed" else ""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        ["bash", "-c", f'exec "$@"{words}', "bash", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        stdin=subprocess.DEVNULL,
        stdout=write if out == "gone" else subprocess.PIPE,
        stderr=write if err == "gone" else subprocess.PIPE,
        text=True,
        timeout=200,
        check=False,
    )
    os.close(write)
    assert "Traceback" not in (done.stderr or "") and "Exception ignored" not in (done.stderr or ""), done.stderr
    return done.returncode, done.stdout or "", done.stderr or ""


SCRIPT = """
import sys
from pathlib import Path
from megatron.errors import DataError, exit_on_error
with exit_on_error(*map(eval, sys.argv[3:])):
    for i in range(3000):
        print("a line of text that fills buffers", i)
    print("said", file=sys.stderr)
    open(sys.argv[2], "w").write("done")
    if sys.argv[1] == "mistake":
        raise DataError("a mistake")
    if sys.argv[1] == "exit":
        raise SystemExit(0)
"""


@pytest.mark.parametrize("end", ["plain", "exit", "mistake"])
@pytest.mark.parametrize(
    ("out", "code", "said"), [("gone", 0, ""), ("closed", 0, ""), ("full", 3, "stdout was lost: No space")]
)
def test_the_work_is_done_whatever_becomes_of_stdout(end: str, out: str, code: int, said: str, tmp_path: Path) -> None:
    if out == "full" and not FULL.exists():
        pytest.skip("there is no /dev/full here")
    command = [sys.executable, "-c", SCRIPT, end, str(tmp_path / "work")]
    ended, _, err = start(command, out=out)
    assert (tmp_path / "work").read_text() == "done", "no file of ours took the number of a closed stream"
    assert ended == (3 if end == "mistake" else code)
    assert "a mistake" in err if end == "mistake" else said in err
    ended, text, _ = start(command, err="closed" if out == "closed" else "gone")
    assert ended == (3 if end == "mistake" else 0) and "said" not in text and "a mistake" not in text
    assert text.count("a line") == 3000


def test_a_screen_beside_the_work_is_a_warning(tmp_path: Path) -> None:
    if not FULL.exists():
        pytest.skip("there is no /dev/full here")
    code, _, err = start([sys.executable, "-c", SCRIPT, "plain", str(tmp_path / "work"), "False"], out="full")
    assert code == 0 and "warning: stdout was lost: No space left on device" in err


@pytest.mark.parametrize(
    "command",
    [pytest.param(p, marks=() if p.parent == ROOT else pytest.mark.slow, id=str(p.relative_to(ROOT))) for p in COMMANDS],
)
def test_help_that_nobody_reads(command: Path) -> None:
    code, _, _ = start([sys.executable, str(command), "--help"], out="gone")
    assert code == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A trained run's folder, and its config as arguments."""
    folder = tmp_path_factory.mktemp("streams")
    places = {"run_dir": str(folder / "run"), "save": str(folder / "run/checkpoints"), "load": str(folder / "run/checkpoints")}
    config = write_run(folder / "data", train_iters=2, train_batch_size=2, eval_split="train", **places)
    made = run_here("train.py", config)
    assert made.returncode == 0, made.stderr
    return folder / "run", [str(config)]


@pytest.mark.slow
@pytest.mark.parametrize(("out", "code"), [("gone", 0), ("closed", 0), ("full", 3)])
def test_commands(out: str, code: int, run: tuple[Path, list[str]], tmp_path: Path) -> None:
    if out == "full" and not FULL.exists():
        pytest.skip("there is no /dev/full here")
    folder, config = run
    made = {
        tmp_path / "hf": ["tools/convert_to_hf.py", "--checkpoint", str(folder), "--output", str(tmp_path / "hf")],
        tmp_path / "ev*.json": [
            "eval.py",
            *config,
            "--eval_tasks",
            "perplexity",
            "--eval_results_prefix",
            str(tmp_path / "ev"),
        ],
        folder / "loss.png": ["tools/summary.py", str(folder)],
        folder: ["tools/checkpoint.py", "inspect", str(folder), "--tensors"],
    }
    for path, words in made.items():
        ended, err = run_forked(words, tmp_path, out=out)
        assert ended == code and "Traceback" not in err, (words, err)
        assert list(path.parent.glob(path.name)), words
    talk = ["generate.py", *config, "--set", "text_gen_type=interactive"]
    assert run_forked(talk, tmp_path, out=out)[0] == code
    if out == "closed":
        assert run_forked(talk, tmp_path, stdin="closed")[0] == 0
        write = ["generate.py", *config, "-o", str(tmp_path / "o")]
        assert run_forked(write, tmp_path, out=out, err="closed", stdin="closed")[0] == 0
        assert (tmp_path / "o").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("out", ["gone", "closed", "full"])
def test_training(out: str, run: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Its results are files: a lost console changes nothing, not even the exit code."""
    words = ["train.py", *run[1], "--set", f"run_dir={tmp_path}", "--set", "save=null", "--set", "load=null"]
    code, err = run_forked(words, tmp_path, out=out, err="kept" if out == "full" else out)
    assert code == 0 and "Traceback" not in err, err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
