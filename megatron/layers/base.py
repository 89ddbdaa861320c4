"""The interface of a token mixer.

A mixer maps `x [b, s, d]` (already normalised) to `y [b, s, d]`; norms, residuals and the MLP belong to the surrounding block.
It is written for one device. `tests/layers/test_contract.py` checks these clauses on every registered mixer
(`python tools/layer.py check NAME` prints a table, one line per check):

1.  *Registration.* `names` select the mixer in `attention_config`; `Config` defines its options, each with a literal default
    and a string after it. The registry reads both from the source text. A `Config` may inherit from another in the same file.
2.  *Causality*, except for the first `two_way` tokens of a text, which every token sees.
3.  *Equivalence.* A full pass, a chunked prefill and subsequent calls of `step` yield the same outputs. Input states are not
    modified, unless `ctx.in_place` allows `step` to overwrite them (with `steps_by_slot`: in the rows `ctx.slots`).
4.  *Padding* (`ctx.mask`) on either side of a row changes neither outputs nor the state.
5.  *Document masking* (`ctx.segment_ids`): no information crosses a document boundary, in outputs or in the state.
6.  *Backends.* `ctx.backend="reference"` and `"auto"` agree, gradients included.
7.  *Local sizes.* `forward` never uses the global number of heads: it reads `q_proj.out_features`, which
    `parallel/tensor.py` shards according to `plan()`. It calls its modules and does not read their weights, so that adapters,
    quantised weights and hooks of an exported model take effect (`ops/modules.py`).
8.  *Tensor parallelism.* It calls `self.copy_to_tp(u)` once before the computation on separate heads and
    `self.reduce_from_tp(y)` once on their partial sums: identities on one device, Megatron's two all-reduces (f and g) under
    tensor parallelism. `tp_reductions` declares additional reductions. A `replicated` parameter acts before `copy_to_tp` or
    after `reduce_from_tp`, since in between each rank would hold only a part of its gradient. For any number of ranks that
    divides `Config.tp_divisor()` the shards add up to the unsharded layer; `set_shard` passes a shard its number.
9.  *Parameter tables:* `plan()` and `init_rules()` name all parameters, `no_decay()` some. `pack_weights` may move them in
    memory but does not change values.
10. *Own inputs.* An input of only this mixer is a field of its `Inputs` (None if it has none), never of `Context`.
11. *Costs:* `state_size` and `param_count` agree with the tensors; `flops` is positive and grows with the length, and
    `tests/model/test_cost.py` compares it with measured counts.
12. *Context parallelism.* With `ctx.cp` a pass sees one shard of every row and asks the other ranks only through that object,
    usually in one line per memory: `ctx.history` for a convolution, `ctx.start` for a state (`ops/summary/` has what a shard
    leaves behind). `history_async` and `start_async` return a function that waits: projections that are computed before it is
    called overlap with the exchange, and so do their gradients. All ranks call these methods in the same order, and every
    result enters the output. The shards' outputs and the sums of their gradients are those of the whole row. A mixer that does
    so sets `context_parallel`.

Shapes, everywhere in this folder: b batch, s sequence, d hidden, h heads, k key width per head, v value width per head.
Files of this folder import only torch, this file and `megatron.ops`: `export/` packs their text into the exported folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from megatron.ops.context_shard import ContextShard as ContextShard

State = dict[str, Tensor]
Summary = Callable[[], tuple[Tensor, Tensor | None]]  # of a shard: `state` and `decay` of `ContextShard.carry`


@dataclass(frozen=True)
class LayerConfig:
    """Options of every mixer; fields that a mixer's nested `Config` adds become the YAML keys `<name>_<field>`.

    Attributes:
        neox_keys: field -> GPT-NeoX key that provides the value if the field's own key is not set (None if neither is set).
        no_options: inherited fields that are not YAML keys.
        hidden_size: width of the model (d).
        num_heads: heads of the model (h).
        layer_index: index of the layer in the model.
    """

    neox_keys: ClassVar[Mapping[str, str]] = {}
    no_options: ClassVar[tuple[str, ...]] = ()

    hidden_size: int
    num_heads: int
    layer_index: int = 0

    def resolved(self) -> LayerConfig:
        """The same options with derived values filled in and options without effect at their defaults.

        Two configurations of a mixer are equivalent if and only if they are equal after this call.
        """
        return self

    def tp_divisor(self) -> int:
        """The maximum number of equal shards: model_parallel_size must divide it.

        By default the model's number of heads; a layer with its own heads or channels overrides it.
        """
        return self.num_heads

    def cp_divisor(self) -> int:
        """Heads that context-parallel ranks share among them: tensor x context parallel size must divide it; 0: none."""
        return 0

    def cp_halo(self) -> int:
        """Tokens that a context-parallel shard reads from its left neighbour, the shortest length of a shard."""
        return 0


@dataclass(frozen=True)
class LayerInputs:
    """Base class of a mixer's `Inputs`: inputs of a pass in addition to the hidden states and the `Context`.

    All fields have defaults, which mean "not given"; their names are keyword arguments of an exported model's `forward`,
    so two kinds of mixers must not share a name. Tensors are [b, s], one value per token of the pass.
    """

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the fields (from `__match_args__`, which torch.compile can trace, unlike `dataclasses.fields`)."""
        return cls.__match_args__

    def of_pass(self, batch: int, seen: int, length: int) -> LayerInputs:
        """The inputs of the pass over tokens seen .. seen + length - 1, from inputs for the complete text.

        An exported model calls this on the arguments of its `forward`.

        Args:
            batch: rows.
            seen: tokens per row that earlier passes read.
            length: tokens of this pass.

        Raises:
            ValueError: a value is invalid.
        """

        def slice_tokens(t: Tensor) -> Tensor:
            if t.dim() != 2 or t.shape[0] != batch or t.shape[1] < seen + length:
                raise ValueError(f"inputs of {type(self).__name__} must be [{batch}, {seen + length}], got {tuple(t.shape)}")
            return t[:, seen : seen + length]

        return self.map(slice_tokens)

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerInputs:
        """Apply `change` to every tensor."""
        values = {name: getattr(self, name) for name in self.names()}
        return type(self)(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})


InputsOf = TypeVar("InputsOf", bound=LayerInputs)


@dataclass(frozen=True)
class Context:
    """The inputs of a pass, in addition to the hidden states, for all layers.

    Attributes:
        mask: [b, s], 1 for a token and 0 for padding; None without padding.
        segment_ids: [b, s] integers that increase by one at each document boundary; None without document masking.
        backend: implementation of the operators in `ops/`: auto | reference | torch | triton | fla.
        in_place: `step` may overwrite its input states (buffers of a captured CUDA graph).
        slots: [b], with `in_place` and a mixer of `steps_by_slot`: the row of the states for each batch row; None: row i.
        attentions: if a list, layers with attention weights append them, [b, h, s, keys].
        inputs: inputs of individual mixers, see `Layer.Inputs`; a mixer reads its own with `ctx.read(kind)`.
        cp: the shard of every row that this pass sees; None without context parallelism.
    """

    mask: Tensor | None = None
    segment_ids: Tensor | None = None
    backend: str = "auto"
    in_place: bool = False
    slots: Tensor | None = None
    attentions: list[Tensor] | None = None
    inputs: tuple[LayerInputs, ...] = ()
    cp: ContextShard | None = None

    def __post_init__(self) -> None:
        if self.cp is not None and self.mask is not None:
            raise ValueError("context parallelism takes rows without padding: pack them, or run with context_parallel_size 1")

    def history(self, x: Tensor, n: int, state: State | None, name: str) -> Tensor | None:
        """The n inputs before x [b, s, ...]: the state's entry, else the halo of the shard, else None (none)."""
        return self.history_async(x, n, state, name)()

    def history_async(self, x: Tensor, n: int, state: State | None, name: str) -> Callable[[], Tensor | None]:
        """`history`, as a function that waits: what is computed before the call overlaps with the exchange."""
        if self.cp is not None and state is None and n > 0:
            return self.cp.halo_async(x, n)
        return lambda: None if state is None else state[name]

    def start(self, state: State | None, name: str, summary: Summary, *, matrix: bool = False) -> Tensor | None:
        """`start_async`, waited for at once."""
        return self.start_async(state, name, summary, matrix=matrix)()

    def start_async(
        self, state: State | None, name: str, summary: Summary, *, matrix: bool = False
    ) -> Callable[[], Tensor | None]:
        """Waits for the state before the first token: its entry, else what earlier shards leave behind, else None (empty).

        Args:
            state: state of the pass.
            name: its entry.
            summary: called under context parallelism only.
            matrix: see `ContextShard.carry`.
        """
        if self.cp is not None and state is None:
            return self.cp.carry_async(*summary(), matrix=matrix)
        return lambda: None if state is None else state[name]

    def read(self, kind: type[InputsOf]) -> InputsOf:
        """The inputs of one kind, or their defaults if the pass has none."""
        return next((inputs for inputs in self.inputs if isinstance(inputs, kind)), kind())

    def map(self, change: Callable[[Tensor], Tensor]) -> Context:
        """Apply `change` to every tensor [b, s]: a permutation, another device."""
        mask, ids = (None if t is None else change(t) for t in (self.mask, self.segment_ids))
        return replace(self, mask=mask, segment_ids=ids, inputs=tuple(inputs.map(change) for inputs in self.inputs))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Context:
        """The context on another device; accelerate calls this if a model's layers are on several devices."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))


class Layer(nn.Module):
    """Base of all token mixers.

    Attributes:
        names: names of the mixer in `attention_config`; the first is the prefix of its options.
        uses_heads: the mixer depends on `num_attention_heads`; a model without such mixers does not need the key.
        tp_reductions: reductions over the tensor-parallel ranks per pass; with more than the one in `reduce_from_tp`, sequence
            parallelism is refused.
        steps_by_slot: `step` honours `ctx.slots`, so that a server's states stay in place.
        context_parallel: `forward` honours `ctx.cp`, clause 12.
        Config: its options.
        Inputs: inputs of this mixer only, None if it has none.
    """

    names: ClassVar[tuple[str, ...]] = ()
    uses_heads: ClassVar[bool] = True
    tp_reductions: ClassVar[int] = 1
    steps_by_slot: ClassVar[bool] = False
    context_parallel: ClassVar[bool] = False
    Config: ClassVar[type[LayerConfig]] = LayerConfig
    Inputs: ClassVar[type[LayerInputs] | None] = None

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.copy_to_tp: nn.Module = nn.Identity()
        self.reduce_from_tp: nn.Module = nn.Identity()

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix `x [b, s, d]` -> `y [b, s, d]`.

        Args:
            x: [b, s, d], any s; `step` is the fast path for s = 1.
            ctx: the context of the pass.
            state: state of an earlier call or of `init_state`, never modified in place; None: empty history.

        Returns:
            y [b, s, d], and the new state (None if `state` is None).
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One decode step: `x [b, d]` -> `y [b, d]` and the new state; equal to `forward` on one token.

        With `ctx.in_place` the returned state may consist of the input tensors, overwritten; entries of a window may then be
        in another order, in which only further steps in place read them.
        """
        raise NotImplementedError

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """The empty state: named tensors with the batch on dim 0, so that beam search can reorder them.

        A recurrent state is named `recurrent` (or `ssm`), the last inputs of a convolution `conv`: memory reports rely on
        these names (`model/state_size.py`).
        """
        raise NotImplementedError

    def two_way(self, ctx: Context) -> int:
        """Number of leading tokens that are read in both directions, 0 for a causal layer.

        The first pass over a text must contain all of them, and the model sees labels among them.
        """
        return 0

    def set_shard(self, rank: int, size: int) -> None:
        """Tell the layer that it is shard `rank` of `size`; called once, after sharding its parameters.

        Only layers whose heads depend on their global index (ALiBi's slopes) need it.
        """

    def draws_random(self) -> bool:
        """Whether a training pass draws random numbers (dropout), which activation recomputation must reproduce."""
        return False

    def plan(self) -> Mapping[str, str]:
        """Parameter name (relative to this layer) -> how it is sharded: column | row | heads | replicated."""
        raise NotImplementedError

    def init_rules(self) -> Mapping[str, str]:
        """Parameter name -> initialiser role: input | output | zeros | ones | conv | ..., see `model/init.py`."""
        raise NotImplementedError

    def no_decay(self) -> tuple[str, ...]:
        """Parameters without weight decay, in addition to biases and norms."""
        return ()

    def pack_weights(self) -> None:
        """Make parameters that a fused path reads as one contiguous in memory; called once, after initialisation or loading."""

    def flops(self, seq_length: int) -> float:
        """Forward floating point operations per token, projections included; a multiply-add counts 2."""
        raise NotImplementedError

    def state_size(self) -> Mapping[str, int]:
        """Elements per sequence of each state tensor."""
        return {name: t.numel() for name, t in self.init_state(1, torch.float32, "meta").items()}

    def param_count(self) -> int:
        """Number of parameters of this mixer on one device."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def build(cls, common: Mapping[str, Any], options: Mapping[str, Any]) -> Layer:
        """Build a mixer from the common fields and its own options; unknown options raise a TypeError."""
        return cls(cls.Config(**common, **options))


def inputs_of(layers: Iterable[Layer], values: Mapping[str, Any]) -> tuple[LayerInputs, ...]:
    """Build the `Inputs` that the layers of a model declare, one per kind, from values by name; None means "not given".

    Training, generation, evaluation and exported models all pass inputs this way.

    Args:
        layers: mixers of the model.
        values: input name -> value.

    Raises:
        ValueError: no layer declares such an input, or its value is invalid.
    """
    given = {name: value for name, value in values.items() if value is not None}
    kinds = list(dict.fromkeys(layer.Inputs for layer in layers if layer.Inputs is not None))
    declared = {kind: [name for name in kind.names() if name in given] for kind in kinds}
    unknown = given.keys() - {name for names in declared.values() for name in names}
    if unknown:
        raise ValueError(f"{min(unknown)} is an input of other mixers than this model has")
    return tuple(kind(**{name: given[name] for name in names}) for kind, names in declared.items())


def input_names(layers: Iterable[Layer]) -> list[str]:
    """Names of the inputs that the layers of a model declare, sorted."""
    return sorted({name for layer in layers if layer.Inputs is not None for name in layer.Inputs.names()})
