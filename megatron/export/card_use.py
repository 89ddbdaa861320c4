"""The usage section of the model card: loading, batches, packing, fine-tuning, label smoothing."""

from __future__ import annotations

_LOAD = """## Use

Needs `torch`, `transformers` and `safetensors`, nothing else.

```python
{head}from transformers import {auto}

folder = "."
{read}model = AutoModelForCausalLM.from_pretrained(folder{trust})
output = model.generate(**{inputs}, max_new_tokens=64)
{show}
```
"""

_BATCHES = """### Batches

Pad prompts of different lengths on the left and pass the `attention_mask`; each row then generates what it generates alone.
"""

_BATCHES_TEXT = """
```python
batch = tokenizer(["One prompt", "Another, longer prompt"], return_tensors="pt", padding=True, padding_side="left")
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=64)))
```
"""

_PACKING = """### Packing

Several documents fit into one row without padding if `position_ids` restart at each document's first token, as
`DataCollatorWithFlattening` writes them; the logits equal those of the separate documents.

```python
from transformers import DataCollatorWithFlattening

rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
model(**DataCollatorWithFlattening(return_tensors="pt")(rows))
```
"""

_FINE_TUNING = """### Fine-tuning

`Trainer` works without changes; labels are the tokens themselves (the model shifts them), -100 to mask the loss.
With PEFT:

```python
from peft import LoraConfig, get_peft_model

model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
```
"""

SMOOTHING_REMEDY = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.model_type] = type(model).__name__"
"""The line that fixes Trainer's label smoothing for a model whose code is in its folder."""

_SMOOTHING = f"""### Label smoothing

With `TrainingArguments(label_smoothing_factor=...)`, `Trainer` computes the loss itself and shifts the labels only for
classes in a table of transformers, which lists no model with code in its folder: such a model learns to repeat its input.
This model registers itself in the table when it is instantiated. For other models, or if the entry is lost (an object sent
to another process), one line before training does the same; apply it to the model before PEFT wraps it:

```python
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

{SMOOTHING_REMEDY}
```
"""


_PREFIX = """### The prefix

The model reads the first {length} tokens of a text in both directions (JRT); `prefix_length=N` changes their number for a call,
0 reads from left to right. A prompt should fill the prefix: with the cache, later tokens are read from left to right, and
without it a longer text forms a longer prefix. The model sees the tokens inside the prefix: set their labels to -100 in
fine-tuning, or train with `prefix_length=0`.
"""


def how_to_use(tokenizer: bool, native: bool, prefix: int = 0) -> str:
    """The usage section of the card.

    Args:
        tokenizer: the folder holds a tokenizer.
        native: transformers' own classes load the folder; omits the sections about code in the folder.
        prefix: number of tokens that prefix layers read in both directions; 0 without such layers.

    Returns:
        Markdown that ends with a newline.
    """
    trust = "" if native else ", trust_remote_code=True"
    load = _LOAD.format(
        head="" if tokenizer else "import torch\n",
        auto="AutoModelForCausalLM, AutoTokenizer" if tokenizer else "AutoModelForCausalLM",
        read=f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n" if tokenizer else "",
        trust=trust,
        inputs='tokenizer("Once upon a time", return_tensors="pt")'
        if tokenizer
        else '{"input_ids": torch.tensor([[1, 2, 3]])}',
        show="print(tokenizer.decode(output[0]))" if tokenizer else "print(output)",
    )
    batches = _BATCHES + (_BATCHES_TEXT if tokenizer else "")
    own = () if native else (_PACKING, *((_PREFIX.format(length=prefix),) if prefix else ()))
    return "\n".join([load, batches, *own, _FINE_TUNING, *(() if native else (_SMOOTHING,))])
