"""How fast the data path is, as JSON: tokenising against the bare library, loading, and building the index of a huge corpus.

    python tools/bench/data.py --output benchmarks/results/data-cpu.json [--skip-index] [--documents 300000000]

Aims: each worker tokenises at 0.85 of the speed of the `tokenizers` library alone on one thread, N workers measured against N
processes of the library at once (two cores of one machine are seldom twice as fast as one); the sample index of 300 billion
tokens in 300 million documents takes under 60 s and 6 GiB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["RAYON_NUM_THREADS"] = "1"  # before the library starts: its threads would hide what one worker does

import numpy as np

from megatron.data.corpora import python_sources
from megatron.data.encode import EncodeJob, EncodeOptions, encode_corpus
from megatron.data.order import build_sample_index
from megatron.data.sources import datasets_from_split
from megatron.data.train_tokenizer import train_to_file
from megatron.errors import exit_on_error
from megatron.files import write_json

VOCABULARY = 32768
SEQ_LENGTH = 2048


def make_text(folder: Path, megabytes: int) -> tuple[Path, Path, list[str]]:
    """(JSON lines of the standard library's sources, repeated to the size asked, a BPE trained on them, the texts)."""
    sources = [path.read_text("utf-8", errors="ignore") for path in python_sources(Path(sysconfig.get_path("stdlib")))]
    train_to_file(sources, "bpe", VOCABULARY, folder / "tokenizer.json")
    texts: list[str] = []
    size = 0
    while size < megabytes * 1_000_000:
        text = sources[len(texts) % len(sources)]
        texts.append(text)
        size += len(text.encode())
    texts = [text for text in texts if text]
    with open(folder / "text.jsonl", "w", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return folder / "text.jsonl", folder / "tokenizer.json", texts


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def best(actions: dict[str, Callable[[], int]], repeats: int) -> dict[str, tuple[float, float]]:
    """(units per second, units per second of processor time) of the fastest run of each action.

    Other work on the machine only ever makes a run slower; the actions take turns, so that it meets them alike.
    """
    rates = dict.fromkeys(actions, (0.0, 0.0))
    for _ in range(repeats):
        for name, action in actions.items():
            begin, cpu = time.perf_counter(), cpu_seconds()
            units = action()
            measured_rates = units / (time.perf_counter() - begin), units / (cpu_seconds() - cpu)
            rates[name] = max(rates[name][0], measured_rates[0]), max(rates[name][1], measured_rates[1])
    return rates


def tokenisation(folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Tokens/s of preprocessing with one and two workers, and of the bare library in as many processes."""
    from tokenizers import Tokenizer

    text, vocab_file, texts = make_text(folder, megabytes)

    def encode(part: list[str]) -> int:
        library = Tokenizer.from_file(str(vocab_file))  # a new one each time, as in a job: its cache of words begins empty
        batches = (part[at : at + 256] for at in range(0, len(part), 256))
        return sum(len(encoding.ids) for batch in batches for encoding in library.encode_batch_fast(batch))

    def alone(processes: int) -> int:
        if processes == 1:
            return encode(texts)
        context = multiprocessing.get_context("fork")
        counts = context.SimpleQueue()
        children = [context.Process(target=lambda at=at: counts.put(encode(texts[at::processes]))) for at in range(processes)]
        for child in children:
            child.start()
        total = sum(counts.get() for _ in children)
        for child in children:
            child.join()
        return total

    job = EncodeJob("HFTokenizer", str(vocab_file), append_eod=True)

    def ours(workers: int) -> int:
        options = EncodeOptions(workers, log_interval=10**9)
        return encode_corpus(job, [str(text)], str(folder / "made"), options).tokens["text_document"]

    actions = {"library_1": lambda: alone(1), "workers_1": lambda: ours(1)}
    actions |= {"library_2": lambda: alone(2), "workers_2": lambda: ours(2)}
    rates = best(actions, repeats)
    result: dict[str, Any] = {"text_megabytes": megabytes}
    for name, (rate, per_cpu) in rates.items():
        result[name] = {"tokens_per_s": round(rate), "tokens_per_cpu_s": round(per_cpu)}
        if name.startswith("workers"):
            wall, cpu = rates[name.replace("workers", "library")]
            result[name] |= {
                "per_worker_over_library": round(rate / wall, 3),
                "per_cpu_s_over_library": round(per_cpu / cpu, 3),
            }
    return result


def loading(folder: Path, seconds: float) -> dict[str, Any]:
    """Samples/s of the loader on the corpus just made, with and without threads that read ahead."""
    from megatron.data.batches import MicroBatchLoader  # imports torch, which the workers of `tokenisation` would load too

    result: dict[str, Any] = {"seq_length": SEQ_LENGTH, "micro_batch": 8}
    dataset = datasets_from_split(str(folder / "made_text_document"), "1", SEQ_LENGTH, {"train": 200_000}, 1)["train"]
    assert dataset is not None
    for threads in (0, 2):
        batches = MicroBatchLoader(dataset, 8, 0, 1, num_workers=threads, eod_token=0, reset_state_at_eod=True)
        begin, samples = time.perf_counter(), 0
        for batch in batches:
            samples += len(batch.sample_ids)
            if time.perf_counter() - begin > seconds:
                break
        rate = samples / (time.perf_counter() - begin)
        result[f"threads_{threads}"] = {"samples_per_s": round(rate), "tokens_per_s": round(rate * SEQ_LENGTH)}
    return result


def build_index(documents: int, mean: int) -> dict[str, Any]:
    """Build the order of one epoch; run in a process of its own, whose peak is the memory needed, the sizes included."""
    sizes, rng = np.empty(documents, dtype=np.int32), np.random.default_rng(0)
    for at in range(0, documents, 1 << 22):
        chunk = sizes[at : at + (1 << 22)]
        chunk[:] = rng.exponential(mean, len(chunk)) + 1
    tokens = int(sizes.sum(dtype=np.int64))
    before, cpu = time.perf_counter(), time.process_time()
    order = build_sample_index(range(documents), sizes, SEQ_LENGTH, tokens // SEQ_LENGTH - 1, 1234)
    return {
        "documents": documents,
        "tokens": tokens,
        "samples": len(order),
        "seq_length": SEQ_LENGTH,
        "seconds": round(time.perf_counter() - before, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gib_with_the_sizes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--documents", type=int, default=300_000_000, help="of the simulated corpus, 1000 tokens each")
    parser.add_argument("--megabytes", type=int, default=30, help="text to tokenise")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts")
    parser.add_argument("--skip-index", action="store_true", help="leave the index out")
    parser.add_argument("--only-index", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_index:
        print(json.dumps(build_index(args.documents, 1000)))
        return
    result: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["tokenisation"] = tokenisation(folder, args.megabytes, args.repeats)
        result["loader"] = loading(folder, 5.0)
    if not args.skip_index:
        command = [sys.executable, __file__, "--only-index", "--documents", str(args.documents)]
        result["load_before_index"] = os.getloadavg()
        result["index"] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result["load_after"] = os.getloadavg()
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, result)


if __name__ == "__main__":
    with exit_on_error():
        main()
