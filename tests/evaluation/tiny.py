"""A tiny trained model as a checkpoint, and small datasets in folders of their hub names: lm-eval without a download."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.save import save_weights
from megatron.model.build import build_model, param_specs
from megatron.model.config import ModelConfig
from megatron.model.init import init_weights
from megatron.model.loss import token_loss
from megatron.parallel.shard_spec import slice_of

TEXT = (
    "Question: what does the cat do?\nAnswer: the cat sat on the mat.\nName: Anna\nCity: Paris\nQuestion: where is the dog?\n"
    "Answer: the dog is in the house.\nName: Ben\nCity: Rome\nthe answer is in the text and the text is in the answer.\n"
)
LENGTH = 384  # lm-eval's squad_completion asks for 256 new tokens
FACTS = {"tokenizer": {"type": "CharLevelTokenizer", "vocab_size": 512, "eod": 0, "pad": 1}, "seq_length": LENGTH}


def tiny_config(*mixers: str, **changes: Any) -> ModelConfig:
    """Two heads, width 32, the byte vocabulary with eight rows of padding."""
    values: dict[str, Any] = {"vocab_size": 520, "hidden_size": 32, "num_heads": 2, "mlp_width": 48, "tie_embeddings": True}
    return ModelConfig(num_layers=len(mixers), layer_types=mixers, **(values | changes))


def trained_checkpoint(folder: Path, config: ModelConfig, steps: int = 120) -> Path:
    """A `global_step` folder of a model that has read `TEXT` for some steps."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build_model(config)
    specs = param_specs(config)
    names = {name: name for name, _ in model.named_parameters()}
    whole = {"slices": lambda spec: slice_of(spec.shape, spec.cut, 0, 1), "device": "cpu", "dtype": torch.float32}
    init_weights(model, names, specs, config, 7, **whole)
    ids = torch.tensor(list(TEXT.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(steps):
        starts = torch.arange(4) * 37 + step * 11
        rows = torch.stack([ids.roll(-int(start))[:65] for start in starts % len(ids)])
        loss = token_loss(model(rows[:, :-1])[0], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return save_weights(folder, weights, specs, model_config=config.to_dict(), iteration=steps, facts=FACTS)


def write_jsonl(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One record per line, folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def write_standard(root: Path) -> Path:
    """Multiple choice (piqa), rolling likelihood (wikitext) and last-word likelihood (lambada) in hub folders below `root`."""
    goals = ["what does the cat do?", "where is the dog?", "who is in Rome?", "what is in the text?", "is it the mat?"]
    pairs = [("the cat sat", "a mat"), ("in the house", "in Rome"), ("Ben", "Anna is"), ("the answer", "City"), ("y", "n")]
    rows = [{"goal": g, "sol1": a, "sol2": b, "label": i % 2} for i, (g, (a, b)) in enumerate(zip(goals, pairs, strict=True))]
    for split in ("train", "validation"):
        write_jsonl(root / "baber/piqa" / f"{split}.jsonl", rows)
    pages = [{"page": f" = The mat = \n \n {(TEXT * 3)[i * 31 : i * 31 + 60 + 250 * i]} \n"} for i in range(3)]
    home = root / "EleutherAI/wikitext_document_level"
    for split in ("train", "validation", "test"):
        write_jsonl(home / f"raw/{split}.jsonl", pages)
    files = "".join(f"  - split: {s}\n    path: raw/{s}.jsonl\n" for s in ("train", "validation", "test"))
    (home / "README.md").write_text(f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}---\n")
    ends = [{"text": "the cat sat on the mat"}, {"text": "the dog is in the house."}, {"text": "Name: Anna City: Paris"}]
    write_jsonl(root / "EleutherAI/lambada_openai" / "test.jsonl", ends)
    return root


def write_recall(root: Path) -> Path:
    """Records of all recall datasets with the fields that the tasks read, white space and all."""
    cue = "Summary of information above..."
    pairs = [
        ("name", "Anna"),
        ("city", "Paris"),
        ("city", "Rome"),
        ("colour", ""),
    ]  # one character of white space is no anchor: dropped
    body = "Name: Anna\nCity: Paris\nthe cat sat on the mat in Rome. "
    swde = [{"text": f"\n{body * (i + 1)}{cue} {k}:", "key": k, "value": f" {v}"} for i, (k, v) in enumerate(pairs)]
    fda = [{"text": f"\n{body}\n{k}:", "key": k, "value": f"{v} "} for k, v in pairs]
    squad = [
        {"text": f" {body}the cat sat on the ", "value": "mat", "question": "Where?", "context": f"{body}Question: Where?"},
        {"text": f"{body}Anna is in", "value": " the text ", "question": "Where is Anna?", "context": body},
    ]
    cloze = {"question": "the cat sat on the", "orig_question": "Where did the cat sit?:", "answers": ["mat", "floor"]}
    qa = [{"context": f"[DOC] [TLE] {body}the cat sat on the", **cloze}, {"context": f"{body} [PAR] ", **cloze}]
    sets = {"based-swde-v2": swde, "based-fda": fda, "based-squad": squad, "based_triviaqa": qa, "based_drop": qa}
    for name, records in {**sets, **{f"based_nq_{n}": qa for n in (512, 1024, 2048)}}.items():
        write_jsonl(root / "hazyresearch" / name / "validation.jsonl", records)
    return root
