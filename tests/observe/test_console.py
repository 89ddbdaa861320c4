"""Lines for people that scripts can read too: GPT-NeoX's fields in its order, ours after them."""

from __future__ import annotations

import io
import re
import sys

import pytest

from megatron.observe.console import Console, RunHeader, human, human_flops, human_time, progress_line
from megatron.observe.metrics import CostModel, Interval, Remaining, max_memory_gib

VALUES = {
    "runtime/samples_per_sec": 3.25,
    "runtime/iteration_time": 0.3077,
    "train/learning_rate": 6e-4,
    "runtime/flops_per_sec_per_gpu": 12.34e12,
    "runtime/model_flops_utilization": 0.1234,
    "train/loss_scale": 65536.0,
    "train/grad_norm": 0.873,
    "runtime/tokens_per_sec": 1664.2,
    "runtime/data_wait": 0.0002,
}


def test_the_fields_and_their_order() -> None:
    line = progress_line(20, 100, VALUES, mean_loss=4.123456, skipped=2, nan=1, eta_s=25)
    names = [field.split(":")[0].strip() for field in line.strip(" |").split("|")]
    assert names == [
        "samples/sec",
        "iteration       20/     100",
        "elapsed time per iteration (ms)",
        "learning rate",
        "approx flops per GPU",
        "MFU",
        "lm_loss",
        "loss scale",
        "number of skipped iterations",
        "number of nan iterations",
        "grad norm",
        "tokens/s",
        "data wait (ms)",
        "progress",
        "ETA",
    ]
    for piece in (
        "learning rate: 6.000E-04",
        "12.3TFLOPS",
        "MFU: 12.3%",
        "lm_loss: 4.123456E+00",
        "progress: 20.0%",
        "number of skipped iterations:   2 | number of nan iterations:   1 |",
    ):
        assert piece in line
    found = re.search(r"iteration\s+(\d+)/\s*(\d+) \|.*lm_loss: (\S+) \|.*ETA: (\S+) \|", line)
    assert found and found.groups() == ("20", "100", "4.123456E+00", "0:00:25")


def test_what_is_unknown_is_left_out() -> None:
    values = {k: v for k, v in VALUES.items() if k not in ("runtime/model_flops_utilization", "train/loss_scale")}
    line = progress_line(1, 2, values, mean_loss=None, skipped=1, nan=0, eta_s=0)
    assert "MFU" not in line and "lm_loss" not in line and "loss scale" not in line
    assert "\x1b" not in line


def test_units() -> None:
    assert [human(x) for x in (5, 1234, 380_123_456, 2.7e9, 1.5e13)] == ["5", "1.234K", "380.1M", "2.7B", "15T"]
    assert [human_flops(x) for x in (3.0, 2e3, 4.5e9, 1e15)] == ["3.0FLOPS", "2.0KFLOPS", "4.5GFLOPS", "1.0PFLOPS"]
    assert [human_time(x) for x in (0, 59.6, 3723, 90061)] == ["0:00:00", "0:01:00", "1:02:03", "1d 1:01:01"]


def test_the_first_line() -> None:
    line = RunHeader("metala 24 x 1024", 380_000_000, 330_000_000, 15_000_000_000, 28610, "1 process", "runs/x", 7).line()
    for piece in (
        "metala",
        "380M parameters (330M without",
        "15B tokens in 28610",
        "1 process",
        "runs/x",
        "iteration 7",
    ):
        assert piece in line


def test_throughput() -> None:
    interval = Interval()
    for i in range(4):
        interval.add(seconds=0.5, wait_s=0.1, tokens=1000, samples=10, loss=float(i), skipped=i == 3)
    values = interval.metrics(CostModel(train_flops_per_token=2e9, world_size=2, peak_tflops=10, recompute=True))
    assert values["runtime/iteration_time"] == 0.5
    assert values["runtime/samples_per_sec"] == 20
    assert values["runtime/tokens_per_sec"] == 2000
    assert values["runtime/flops_per_sec_per_gpu"] == pytest.approx(2000 * 2e9 / 2)
    assert values["runtime/model_flops_utilization"] == pytest.approx(0.2)
    assert values["runtime/hardware_flops_utilization"] == pytest.approx(0.2 * 4 / 3)
    assert values["runtime/data_wait"] == pytest.approx(0.1)
    assert interval.mean_loss == 1.0
    assert "runtime/model_flops_utilization" not in interval.metrics(CostModel(1.0))
    assert 0.01 < max_memory_gib() < 1000


def test_losses_that_are_no_numbers_are_counted_and_left_out_of_the_mean() -> None:
    interval = Interval()
    for loss, skipped in ((2.0, False), (float("nan"), True), (float("inf"), True), (9.0, True), (4.0, False)):
        interval.add(seconds=1.0, wait_s=0.0, tokens=1, samples=1, loss=loss, skipped=skipped)
    assert (interval.nan, interval.skipped, interval.mean_loss) == (2, 3, 3.0)


def test_remaining_time_forgets_a_slow_start() -> None:
    remaining = Remaining()
    assert remaining.seconds(10) == 0
    for seconds in (100.0, *[1.0] * 20):
        remaining.update(seconds)
    assert remaining.seconds(10) == pytest.approx(10, rel=0.1)


def test_console_survives_a_closed_stream(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    Console(stream).say("hello")
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] hello\n", stream.getvalue())
    stream.close()
    Console(stream).say("nobody hears this")
    Console().say("to stdout, wherever it points now")
    assert "wherever" in capsys.readouterr().out
    assert sys.stdout is not None
