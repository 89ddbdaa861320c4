"""The small parts of a launch: host files and filters, exported variables, the first error, the supervisor of a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.errors import ConfigError, LaunchError
from megatron.launch import exports
from megatron.launch.hosts import choose_hosts, parse_hostfile
from megatron.launch.job import SUPERVISOR, Job
from megatron.launch.runners import run_job
from megatron.launch.stderr_follower import FirstError

POOL = {"a": 4, "b": 2}


def test_hostfile() -> None:
    assert parse_hostfile("# all\n\na slots=4 # big\nb  slots=2\n", "h") == POOL


@pytest.mark.parametrize(
    ("text", "line"), [("a slots=2\nb 4", "h:2"), ("a slots=2\n#\na slots=1", "h:3"), ("a slots=0", "h:1")]
)
def test_a_bad_line_of_a_hostfile_is_named(text: str, line: str) -> None:
    with pytest.raises(LaunchError) as caught:
        parse_hostfile(text, "h")
    assert caught.value.where == line


def test_an_empty_hostfile_is_refused() -> None:
    with pytest.raises(LaunchError, match="no host"):
        parse_hostfile("# nothing\n", "h")


@pytest.mark.parametrize(
    ("options", "hosts"),
    [
        ({}, {"a": (0, 1, 2, 3), "b": (0, 1)}),
        ({"include": "b@a:0,2"}, {"a": (0, 2), "b": (0, 1)}),
        ({"exclude": "a:1@b"}, {"a": (0, 2, 3)}),
        ({"num_nodes": 1}, {"a": (0, 1, 2, 3)}),
        ({"num_gpus": 2}, {"a": (0, 1), "b": (0, 1)}),
    ],
)
def test_filters(options: dict[str, object], hosts: dict[str, tuple[int, ...]]) -> None:
    known = {"include": None, "exclude": None, "num_nodes": -1, "num_gpus": None, **options}
    assert choose_hosts(POOL, **known) == hosts  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"include": "c"}, "not in the host file"),
        ({"include": "b:2"}, "no slot 2"),
        ({"include": "b:x"}, "no host:slot"),
        ({"exclude": "a@b"}, "leaves no host"),
        ({"num_nodes": 3}, "more than the 2 hosts"),
        ({"num_gpus": 3}, "more than the 2 slots of b"),
    ],
)
def test_bad_filters(options: dict[str, object], words: str) -> None:
    known = {"include": None, "exclude": None, "num_nodes": -1, "num_gpus": None, **options}
    with pytest.raises(ConfigError, match=words):
        choose_hosts(POOL, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "PGPASSWORD", "NCCL_AUTH_TOKEN", "x_password"],
)
def test_secrets_are_known_by_name(name: str) -> None:
    assert exports.is_secret(name, "v")
    assert name not in exports.exported({name: "v"}, ("*",))


def test_other_names_are_no_secrets_and_only_the_list_travels() -> None:
    assert not any(exports.is_secret(n, "v") for n in ("TOKENIZERS_PARALLELISM", "PATH", "OMP_NUM_THREADS", "MONKEY_PATCH_X"))
    assert exports.exported({"PATH": "p", "HOME": "h", "MY_X": "1"}, ("MY_*",)) == {"MY_X": "1", "PATH": "p"}
    assert exports.exported({"NCCL_PROXY": "http://u:p@h"}) == {}


def test_the_runner_does_not_see_secrets_that_it_would_write_on_a_command_line() -> None:
    seen = exports.launcher_environment({"MLFLOW_TRACKING_TOKEN": "x", "WANDB_API_KEY": "x", "HOME": "h"})
    assert seen == {"WANDB_API_KEY": "x", "HOME": "h"}


def test_the_users_environment_file(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("# mine\nA=1\nB=x=y\n")
    assert exports.user_file({}, tmp_path) == {"A": "1", "B": "x=y"}
    (tmp_path / ".deepspeed_env").write_text("A=1\nWANDB_API_KEY=x\n")
    with pytest.raises(LaunchError, match="looks like a secret") as caught:
        exports.user_file({}, tmp_path)
    assert str(caught.value.where).endswith(".deepspeed_env:2")


def test_a_value_that_the_launcher_would_break_is_refused() -> None:
    assert exports.environment_file({"A": "1"}) == "A=1\n"
    with pytest.raises(LaunchError, match="the value of A"):
        exports.environment_file({"A": "$HOME"})


def hear(*lines: str) -> str:
    first = FirstError()
    for line in lines:
        first.hear(line)
    return first.text()


LOST = ["hosta: error (rank 0): rank 1 is lost, this one cannot go on", "hosta:   where: rank 1 (b pid 3)"]


def test_the_cause_is_kept_and_not_its_consequences() -> None:
    cause = ["hostb: error (rank 1): no such file", "hostb:   where: data.bin", "hostb:   try: another"]
    text = hear("hosta: hello", *LOST, *cause, "hosta: bye", "pdsh@hosta: hostb: ssh exited with exit code 3")
    assert text == "hostb: error (rank 1): no such file\n  where: data.bin\n  try: another"


def test_without_a_cause_the_first_consequence_is_said() -> None:
    assert hear(*LOST, "hosta: more").startswith("hosta: error (rank 0): rank 1 is lost")


def test_a_traceback_is_kept_to_its_last_line_among_other_output() -> None:
    lines = [
        "[rank1]: Traceback (most recent call last):",
        "noise",
        '[rank1]:   File "x.py", line 1',
        "[rank1]: ValueError: no",
        "x",
    ]
    assert hear(*lines) == '[rank1]: Traceback (most recent call last):\n  File "x.py", line 1\nValueError: no'


def test_a_report_of_the_watchdog_is_kept_whole() -> None:
    report = ["watchdog of rank 0, hang_timeout 2 s: stuck: rank 1", "rank 1 (b pid 2): phase 'data'", "leaving with code 21"]
    assert hear(*report, "other") == "\n".join(report)


def test_the_end_of_a_host_is_noticed() -> None:
    ended: list[tuple[str, int]] = []
    first = FirstError(lambda host, code: ended.append((host, code)))
    first.hear("pdsh@hosta: hostb: ssh exited with exit code 22")
    first.hear("pdsh@hosta: hostc: connection lost")
    assert ended == [("hostb", 22), ("hostc", 255)]


def supervisor(code: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-SE", SUPERVISOR, *options, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=-1,
        text=True,
    )


@pytest.mark.parametrize(("code", "expected"), [("raise SystemExit(22)", 22), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_keeper_gives_the_exit_code_back(code: str, expected: int) -> None:
    assert supervisor(code).wait(timeout=20) == expected


SLEEPS = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def test_keeper_ends_its_rank_when_the_launcher_is_gone() -> None:
    process = supervisor(SLEEPS, "--watch-stdin")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


@pytest.mark.parametrize("how", ["sigterm", "stdin"])
def test_keeper_kills_a_rank_that_is_stopped(how: str) -> None:
    process = supervisor(SLEEPS, "--watch-stdin")
    assert process.stdin is not None
    assert process.stdout is not None
    os.kill(int(process.stdout.readline()), signal.SIGSTOP)
    time.sleep(0.1)
    begin = time.monotonic()
    if how == "stdin":
        process.stdin.close()
    else:
        process.terminate()
    assert process.wait(timeout=10) == 137
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(("reported", "code"), [((0, 1), 0), ((0,), 22)])
def test_a_job_whose_ranks_have_not_all_reported_has_not_ended_well(reported: tuple[int, ...], code: int) -> None:
    lines = "".join(f"hosta: supervisor: rank {rank} ended with 0\n" for rank in reported)
    command = (sys.executable, "-c", f"import sys; sys.stderr.write({lines!r})")
    assert run_job(Job("hosts", command, {}, 2, launcher="pdsh")) == (code, "")


def test_a_rank_dies_with_its_keeper() -> None:
    process = supervisor(SLEEPS)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] if os.path.exists(f"/proc/{pid}") else "X"
        if state in "ZX":
            return
    assert not os.path.exists(f"/proc/{pid}")
