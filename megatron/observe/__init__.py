"""What a person sees of a run: numbers, lines, plots and the folder they lie in. Nothing here can stop a training.

metrics.py    throughput, FLOPs, utilisation, memory, remaining time
jsonl.py      metrics.jsonl, always written, each step once
sinks.py      TensorBoard and Weights & Biases when asked for
console.py    the first line and the progress lines
plot.py       loss.png from metrics.jsonl
runfolder.py  the one shape of a run folder, and the copy of the console in log_dir
"""
