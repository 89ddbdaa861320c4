"""The page of metrics, and the page of the files that a run reads and writes."""

from __future__ import annotations

from megatron.observe.console import FIELDS
from megatron.observe.metrics import METRICS
from megatron.observe.runfolder import FILES
from megatron.training.reporting import LINES
from tools.reference.markdown import page, table

_SAMPLE = """```text
[2026-11-27 00:28:45]  samples/sec: 24.735 | iteration       10/     600 | elapsed time per iteration (ms): 323.4 | ...
```"""
# Formats with a page of their own: what, where it is described.
_FORMATS = (
    (
        "`PREFIX.bin`, `PREFIX.idx`",
        "Token file: GPT-NeoX's memory-mapped format, byte-compatible.",
        "`megatron/data/token_format.py`",
    ),
    (
        "`PREFIX.meta.json`",
        "Fingerprint of the tokenizer, counts and checksums of a token file.",
        "[tokenizers](../tokenizers.md)",
    ),
    (
        "`*.jsonl`, `.jsonl.zst`, parquet",
        'Text: one `{"text": ...}` per row.',
        "[commands](commands.md#toolsdatasetspreprocess_datapy)",
    ),
    (
        "`global_step<N>/`",
        "Checkpoint: safetensors and `manifest.json`, loads on any mesh.",
        "[checkpoints](../checkpoints.md)",
    ),
    ("exported folder", "Hugging Face folder: config, code, safetensors, tokenizer, model card.", "[export](../export.md)"),
    ("`tokenizer.json` and other tokenizer files", "Which parts of them are supported.", "[tokenizers](../tokenizers.md)"),
    ("GPT-NeoX checkpoints", "Both layouts, read by `tools/checkpoint.py import`.", "[checkpoints](../checkpoints.md)"),
    ("benchmark results", "JSON with device, versions and command.", "`benchmarks/README.md`"),
)


def _metrics_page() -> str:
    metrics = ((f"`{name}`", metric.meaning, metric.unit) for name, metric in METRICS.items())
    return page(
        "Metrics",
        "megatron/observe and megatron/training/reporting.py",
        "A run logs every `log_interval` steps and at its last step: a row in `metrics.jsonl`, a point per key in TensorBoard "
        "(`tensorboard_dir`) and Weights & Biases (`use_wandb`), and a line on the console. A value that is not finite is "
        "`null`. After a resume the rows of steps that run again are dropped, so that each step has one row.",
        "## Keys of metrics.jsonl",
        table(("key", "meaning", "unit"), metrics),
        "## The progress line",
        "Its first fields are GPT-NeoX's, in GPT-NeoX's order, since scripts parse them.",
        _SAMPLE,
        table(("field", "meaning"), ((name, meaning) for name, meaning in FIELDS.items())),
        "## Other lines",
        "Words in capitals stand for a value.",
        table(("line", "meaning"), ((f"`{line}`", meaning) for line, meaning in LINES.items())),
    )


def _files_page() -> str:
    return page(
        "Files and formats",
        "megatron/observe/runfolder.py",
        "## The run folder",
        "Paths below `run_dir`.",
        table(("path", "contents"), ((f"`{path}`", contents) for path, contents in FILES.items())),
        "## Data, checkpoints and exports",
        table(("files", "contents", "described in"), _FORMATS),
    )


def pages() -> dict[str, str]:
    """Path below docs/ -> text."""
    return {"reference/metrics.md": _metrics_page(), "reference/files.md": _files_page()}
