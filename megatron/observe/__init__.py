"""Observability of a run: metrics, console output, plots and the run folder. A failure here never stops training.

metrics.py    throughput, FLOPs, utilisation, memory, time remaining
jsonl.py      metrics.jsonl, always written, one row per step
sinks.py      TensorBoard and Weights & Biases, if configured
console.py    the header line and the progress lines
plot.py       loss.png from metrics.jsonl
runfolder.py  the layout of a run folder, and the copy of the console in log_dir
"""
