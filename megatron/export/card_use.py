"""How an exported folder is used, as its model card says it: loading, batches, packing, fine-tuning, label smoothing."""

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

Prompts of different lengths go into one batch by padding on the left with an `attention_mask`; each row then says what it
says alone.
"""

_BATCHES_TEXT = """
```python
batch = tokenizer(["One prompt", "Another, longer prompt"], return_tensors="pt", padding=True, padding_side="left")
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=64)))
```
"""

_PACKING = """### Packing

Documents go into one row without padding when `position_ids` start over at each document's first token, as
`DataCollatorWithFlattening` writes them; the logits are those of the documents one by one.

```python
from transformers import DataCollatorWithFlattening

rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
model(**DataCollatorWithFlattening(return_tensors="pt")(rows))
```
"""

_FINE_TUNING = """### Fine-tuning

`Trainer` takes the model as it is; labels are the tokens themselves (they are shifted inside), -100 where no loss is wanted.
With PEFT:

```python
from peft import LoraConfig, get_peft_model

model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
```
"""

SMOOTHING_REMEDY = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.model_type] = type(model).__name__"
"""The line that makes Trainer's label smoothing right for a model whose code lies in its folder."""

_SMOOTHING = f"""### Label smoothing

With `TrainingArguments(label_smoothing_factor=...)`, `Trainer` computes the loss itself and shifts the labels only for
classes that it finds in a table of transformers, which lists no model with code in its folder: such a model is trained to
repeat its input. This one enters itself in the table when it is made. For other models, or where the entry was lost (an
object sent to another process), one line before training does the same, on the model itself, before PEFT wraps it:

```python
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

{SMOOTHING_REMEDY}
```
"""


_PREFIX = """### The prefix

The first {length} tokens of a text are read in both directions (JRT); `prefix_length=N` sets another number for a call, 0 reads
from left to right. A prompt should fill the prefix: with the cache, later tokens are read from left to right, and without it a
longer text would form a longer prefix. Labels inside the prefix are tokens that the model sees: set them to -100 in
fine-tuning, or train with `prefix_length=0`.
"""


def how_to_use(tokenizer: bool, native: bool, prefix: int = 0) -> str:
    """The part of the card between the first sentence and the facts.

    Args:
        tokenizer: whether the folder holds one.
        native: whether transformers' own classes load the folder; what is said of code in the folder is left out then.
        prefix: tokens that prefix layers read in both directions; 0 without such layers.

    Returns:
        Markdown that ends with a line break.
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
