# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---
"""Train MetaLA in five minutes and look at it: loss curve, text, perplexity, a Hugging Face folder.

A notebook in percent format: open it in VS Code or with jupytext, or run it, `python examples/train_metala.py`. STEPS and WORK
in the environment make it shorter and choose its folder.
"""

# %% [markdown]
# # MetaLA in five minutes
# A small linear-attention language model on the sources of Python's standard library, on a CPU. Nothing is downloaded.

# %%
import os
from pathlib import Path

import linear_neox as ln

STEPS = int(os.environ.get("STEPS", "300"))
WORK = Path(os.environ.get("WORK", "runs/example-metala"))

# %% [markdown]
# ## Data
# `prepare_data` makes a built-in corpus and its tokenizer. `ln.tokenize_files("my.jsonl", "data/mine", ...)` takes your text.

# %%
corpus = ln.prepare_data("pystdlib", os.environ.get("DATA", "data"))
print(corpus.yaml_lines())

# %% [markdown]
# ## The configuration
# Any key of [configs/arguments.md](../configs/arguments.md) can be given over a shipped YAML.

# %%
config = ln.load_config(
    "configs/metala-quickstart.yml",
    data_path=str(corpus.data_path),
    vocab_file=str(corpus.vocab_file),
    train_iters=STEPS,
    eval_iters=min(8, STEPS),
    load=None,
)
total, inner = ln.count_parameters(config)
print(f"{total:,} parameters, {inner:,} of them outside the embedding")

# %% [markdown]
# ## Train
# A few steps at a time: the trainer goes on where it stood.

# %%
trainer = ln.Trainer(config)
print(f"before the first step: {trainer.evaluate()}")
while trainer.train(max(1, STEPS // 10)):
    print(
        f"step {trainer.iteration:4}  loss {trainer.history[-1].loss:.3f}  {ln.generate(trainer, 'def ', max_new_tokens=12)!r}"
    )
print(f"after the last: {trainer.evaluate()}")

# %% [markdown]
# ## The loss curve

# %%
WORK.mkdir(parents=True, exist_ok=True)
try:
    import matplotlib.pyplot as plt
except ImportError:
    print([round(step.loss, 3) for step in trainer.history])
else:
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.plot([step.iteration for step in trainer.history], [step.loss for step in trainer.history])
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="MetaLA on the standard library")
    figure.savefig(WORK / "loss.png", bbox_inches="tight")

# %% [markdown]
# ## Text, and how surprising some is

# %%
for text in ln.generate(trainer, ["import os\n", "class Reader:\n"], max_new_tokens=48, temperature=0.7, top_k=40):
    print(text, "\n---")
score = ln.perplexity(trainer, ln.read_tokens(corpus.data_path, name="valid", limit=2000))
print(f"perplexity {score.perplexity:.1f} per token over {score.tokens} tokens of the validation split")

# %% [markdown]
# ## A checkpoint, and a folder for transformers
# The folder holds its own code: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` needs nothing of ours.

# %%
checkpoint = trainer.save(WORK / "checkpoints")
print(f"saved {checkpoint}; the same text again: {ln.generate(ln.load_checkpoint(checkpoint), 'def ', max_new_tokens=12)!r}")
exported = ln.export_hf(checkpoint, WORK / f"hf-{trainer.iteration}")
print(f"{exported.folder}: {exported.family}, logits within {exported.difference:.1e} of the checkpoint's")
