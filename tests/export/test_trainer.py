"""transformers' Trainer on every family: train, evaluate, predict, accumulation, resume, half precision, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.export.families import TOKENS, rows

Load = Callable[..., Any]
ROWS = [{**row, "source": "a column that Trainer leaves out"} for row in rows()]


def trainer(model: Any, folder: Path, **options: Any) -> Trainer:
    """Three steps on batches of four rows, one log line per step, nothing saved."""
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
        "data_seed": 1,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**usual, **options})
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:7])


def losses(made: Trainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def test_train_evaluate_predict(load: Load, tmp_path: Path) -> None:
    """Every parameter moves; predictions are the logits alone, of all rows; the loss is the model's own."""
    model, before = load(), load()
    made = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3)
    made.train()
    assert len(losses(made)) == 3
    for (name, a), b in zip(model.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(a, b), name
    found = made.evaluate()["eval_loss"]
    predicted = made.predict(ROWS[:7])
    assert isinstance(predicted.predictions, np.ndarray) and predicted.predictions.shape == (7, 16, 64)
    tokens, labels = (torch.tensor([row[key] for row in ROWS[:7]]) for key in ("input_ids", "labels"))
    with torch.inference_mode():
        own = model.eval()(tokens, labels=labels)
    assert np.allclose(predicted.predictions, own.logits.numpy(), atol=1e-4)
    assert predicted.metrics["test_loss"] == pytest.approx(found)
    assert np.array_equal(predicted.label_ids, labels.numpy())


def test_gradient_accumulation(load: Load, tmp_path: Path) -> None:
    """Four small batches make the step of one big batch, whatever share of their tokens counts."""
    big, small = load(torch.float64), load(torch.float64)
    whole = trainer(big, tmp_path)
    parts = trainer(small, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    for (name, a), b in zip(big.named_parameters(), small.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_resume(load: Load, tmp_path: Path) -> None:
    """A run that is cut and goes on is the uninterrupted one; each of its checkpoints is a folder like any other."""
    unbroken, resumed = load(), load()
    first = trainer(unbroken, tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    second = trainer(resumed, tmp_path, max_steps=4)
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(second) == losses(first)
    for (name, a), b in zip(unbroken.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4", trust_remote_code=True).eval()
    assert torch.equal(again(TOKENS).logits, resumed.eval()(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_autocast(load: Load, dtype: torch.dtype, checkpointing: bool) -> None:
    """Forward in the region, backward outside of it: gradients in fp32, near those without autocast."""
    model, plain = load().train(), load().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.autocast("cpu", dtype):
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    plain(TOKENS, labels=TOKENS).loss.backward()
    assert loss.dtype == torch.float32
    got, want = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plain))
    assert got.dtype == torch.float32 and bool(torch.isfinite(got).all())
    assert float(torch.nn.functional.cosine_similarity(got, want, 0)) > 0.99
    with torch.autocast("cpu", dtype), torch.inference_mode():
        made = model.eval().generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert made.shape == (2, 15)


@pytest.mark.slow
def test_bf16_and_checkpointing_in_trainer(load: Load, tmp_path: Path) -> None:
    """Both by their switches: the losses stay near the plain run's."""
    made, plain = trainer(load(), tmp_path, bf16=True, gradient_checkpointing=True), trainer(load(), tmp_path)
    made.train()
    plain.train()
    assert losses(made) == pytest.approx(losses(plain), rel=0.02)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_gradient_checkpointing(load: Load, reentrant: bool, packed: bool) -> None:
    """Loss and every gradient are those of the plain model."""
    checkpointed, plain = load(torch.float64).train(), load(torch.float64).train()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    places = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])} if packed else {}
    found = [m(TOKENS, labels=TOKENS, **places).loss for m in (checkpointed, plain)]
    for loss in found:
        loss.backward()
    assert torch.allclose(*found)
    for (name, a), b in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-10), name


def test_rows_of_different_lengths(load: Load, tmp_path: Path) -> None:
    """Rows of different lengths, padded on the right by a collator: the loss counts real tokens only."""
    model, cut = load(torch.float64), [3 + i % 14 for i in range(7)]

    def collate(chosen: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in chosen)

        def filled(key: str, value: int) -> torch.Tensor:
            return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in chosen])

        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in chosen])
        return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}

    data = [{"input_ids": row["input_ids"][:n], "labels": row["input_ids"][:n]} for row, n in zip(ROWS, cut, strict=False)]
    made = trainer(model, tmp_path, per_device_eval_batch_size=7)
    made.data_collator = collate
    found = made.evaluate(data)["eval_loss"]
    total = 0.0
    with torch.inference_mode():
        for row, n in zip(data, cut, strict=True):
            total += float(model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss) * (n - 1)
    assert found == pytest.approx(total / sum(n - 1 for n in cut), rel=1e-6)
