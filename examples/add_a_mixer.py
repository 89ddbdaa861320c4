# ---
# jupyter:
#   jupytext:
#     formats: py:percent
# ---
"""Add a token mixer and compare it with others on MQAR (multi-query associative recall, arXiv 2312.04927).

A notebook in percent format: open it in VS Code or with jupytext, or run it, `python examples/add_a_mixer.py`. EPOCHS and
EXAMPLES in the environment make it shorter.
"""

# %% [markdown]
# # A mixer of your own
# Gated linear attention in its plainest form: `S_t = a_t S_{t-1} + k_t^T v_t`, `y_t = q_t S_t`, with a decay `a_t` in (0, 1)
# per head that depends on the input. One class that answers the contract in `megatron/layers/base.py` is all it takes.

# %%
from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import linear_neox as ln
from linear_neox import Context, Layer, LayerConfig, State

# %% [markdown]
# The whole sequence is written as masked attention: `y = (q k^T * D) v`, where `D[t, u]` is the product of the decays after
# `u` up to `t`. A decode step works on the state alone. Head counts come from the module's own sizes, so that tensor
# parallelism may cut it.


# %%
@ln.register_mixer
class DecayAttention(Layer):
    """Linear attention with one input-dependent decay per head; its state is `S [b, h, k, v]`."""

    names: ClassVar[tuple[str, ...]] = ("decay_attention",)

    @dataclass(frozen=True)
    class Config(LayerConfig):
        """Options, which become the keys `decay_attention_<name>`."""

        open_bias: float = 3.0
        """Added to the decay's input: at the start a head forgets little."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.width, self.open_bias = d // config.num_heads, config.open_bias
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.decay_proj = nn.Linear(d, config.num_heads, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`x [b, s, d]` -> q, k, v `[b, h, s, w]` and the logarithms of the decays `[b, h, s]`."""
        q, k, v = (p(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return (
            F.normalize(q, dim=-1),
            F.normalize(k, dim=-1),
            v,
            F.logsigmoid(self.decay_proj(x) + self.open_bias).transpose(1, 2),
        )

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """`x [b, s, d]` -> `y [b, s, d]`; see `Layer.forward`."""
        q, k, v, log_decay = self._inputs(self.copy_to_tp(x))
        if ctx.mask is not None:  # padding writes nothing and forgets nothing
            seen = ctx.mask[:, None].to(v.dtype)
            v, log_decay = v * seen[..., None], log_decay * seen
        total = log_decay.cumsum(-1)
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if ctx.segment_ids is not None:  # documents do not see each other
            visible = visible & (ctx.segment_ids[:, None, :, None] == ctx.segment_ids[:, None, None, :])
        weights = (total[..., :, None] - total[..., None, :]).masked_fill(~visible, -torch.inf).exp()
        y = (q @ k.transpose(-1, -2) * weights) @ v
        if state is None:
            return self.reduce_from_tp(self.out_proj(y.transpose(1, 2).flatten(2))), None
        after = total[..., -1, None, None].exp() * state["S"]
        last = visible[..., -1, :].to(v.dtype)
        if ctx.segment_ids is not None:
            same = (ctx.segment_ids == ctx.segment_ids[:, :1])[:, None].to(v.dtype)
            y = y + (q * (total.exp() * same)[..., None]) @ state["S"]
            after = after * same[..., -1, None, None]
        else:
            y = y + (q * total.exp()[..., None]) @ state["S"]
        kept = k * ((total[..., -1:] - total).exp() * last)[..., None]
        return self.reduce_from_tp(self.out_proj(y.transpose(1, 2).flatten(2))), {"S": after + kept.transpose(-1, -2) @ v}

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """`x [b, d]` -> `y [b, d]`; see `Layer.step`."""
        y, after = self.forward(x.unsqueeze(1), Context(), state)
        assert after is not None
        return y.squeeze(1), after

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """S [b, h, k, v]."""
        return {"S": torch.zeros(batch, self.decay_proj.out_features, self.width, self.width, dtype=dtype, device=device)}

    def plan(self) -> Mapping[str, str]:
        """By head."""
        return {name: "row" if name.startswith("out_proj") else "column" for name, _ in self.named_parameters()}

    def init_rules(self) -> Mapping[str, str]:
        """Every matrix by `init_method`, the output scaled by depth."""
        return {name: "output" if name.startswith("out_proj") else "input" for name, _ in self.named_parameters()}

    def flops(self, seq_length: int) -> float:
        """Four projections, and attention over half of the sequence on average, per token."""
        d = self.config.hidden_size
        return 8.0 * d * d + 2.0 * d * seq_length


print(ln.list_mixers())

# %% [markdown]
# A model of it, and the check that matters: reading a text at once and reading it token by token give the same logits.

# %%
shape = ln.ModelConfig(64, hidden_size=32, num_layers=2, num_heads=2, mlp_width=64, layer_types=("decay_attention",) * 2)
model = ln.build_model(shape).eval()
tokens = torch.randint(0, 64, (2, 20))
with torch.no_grad():
    whole, _ = model(tokens)
    state = model.init_state(2)
    steps = []
    for column in tokens.unbind(1):
        logits, state = model.step(column, state)
        steps.append(logits)
difference = float((torch.stack(steps, 1) - whole).abs().max())
print(f"largest difference between one pass and {tokens.shape[1]} steps: {difference:.1e}")
assert difference < 1e-4

# %% [markdown]
# ## MQAR
# Each example is a list of key-value pairs, then keys whose values are asked for. The same data, width and training for every
# family; `configs/synthetics/mqar-cpu.yml` is the large version.

# %%
examples = int(os.environ.get("EXAMPLES", "8000"))
sweep = {
    "data": {
        "task": "mqar",
        "vocab_size": 256,
        "train": [{"length": 64, "pairs": 4, "examples": examples}],
        "test": [{"length": 64, "pairs": 4, "examples": min(512, examples)}],
    },
    "model": {"hidden_size": 64, "num_heads": 1},
    "training": {"learning_rate": 3.0e-3, "batch_size": 64, "epochs": int(os.environ.get("EPOCHS", "8"))},
    "families": [
        {"name": "convolution + softmax", "layers": ["base_conv", "global"]},
        {"name": "convolution + based", "layers": ["base_conv", "based"]},
        {"name": "convolution + metala", "layers": ["base_conv", "metala"]},
        {"name": "convolution + ours", "layers": ["base_conv", "decay_attention"]},
    ],
}
results = ln.recall_sweep(sweep)

# %%
print(f"\n{'model':26} {'recalled':>8} {'steps':>6} {'state, bytes':>13}")
for row in sorted(results, key=lambda row: -row["accuracy"]):
    print(f"{row['name']:26} {row['accuracy']:8.3f} {row['steps']:6} {row['state_bytes']:13,}")
