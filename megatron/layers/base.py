"""The contract of a token mixer, on one page.

A mixer turns `x [b, s, d]` (already normed) into `y [b, s, d]`; norms, residuals and the MLP belong to the block around it.
It is written for one device. Its clauses, each of which `tests/layers/test_contract.py` checks on every registered mixer
(`python tools/layer.py check NAME` prints them as a table):

1.  *Found by reading.* `names` select it in `attention_config`; `Config` holds its options, each with a literal default and a
    string after it. Both are read as text, so they are literals. A `Config` may inherit from another of the same file.
2.  *Causal*, but for the `two_way` tokens at the start of a text, which every token sees.
3.  *One function, three ways.* A whole pass, a prefill in pieces, and `step` after it give the same outputs. States that come
    in are left alone, unless `ctx.in_place` allows `step` to overwrite them.
4.  *Padding* (`ctx.mask`) on either side of a row neither changes outputs nor enters the state.
5.  *Documents* (`ctx.segment_ids`): nothing of a document reaches the next one, in outputs or in the state.
6.  *Backends.* `ctx.backend="reference"` and `"auto"` agree, gradients included.
7.  *Sizes come from its own modules.* `forward` never uses the global number of heads: it reads `q_proj.out_features`, which
    `parallel/tensor.py` cuts by `plan()`. It calls its modules and does not read their weights, so that adapters, quantised
    weights and hooks of an exported model act (`ops/modules.py`).
8.  *Split and join.* It calls `self.copy_to_tp(u)` once where work on separate heads begins and `self.reduce_from_tp(y)` once
where their
    partial sums meet: the identity on one device, the two all-reduces of Megatron under tensor parallelism. A mixer that sums
    over the ranks more often says so in `tp_reductions`. A parameter that is `replicated` acts before the split or after the
    join, since in between each rank would have a part of its gradient. The parts of any number of ranks that divides
    `Config.tp_divisor()` add up to the whole; `set_shard` tells a part which one it is.
9.  *Tables name every parameter:* `plan()` and `init_rules()` all of them, `no_decay()` some. `pack_weights` may move them in
    memory and changes no value.
10. *Inputs of its own.* What only this mixer reads of a pass is a field of its `Inputs` (None for none), never of `Context`.
11. *Costs:* `flops`, `state_size` and `param_count` are what a counter finds.

Shapes, everywhere in this folder: b batch, s sequence, d hidden, h heads, k key width per head, v value width per head.
Files of this folder import torch, this page and `megatron.ops` only: `export/` packs their text into the checkpoint folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class LayerConfig:
    """What every mixer is told; the fields that a mixer adds in its nested `Config` become the YAML keys `<name>_<field>`.

    Attributes:
        neox_keys: field -> GPT-NeoX key that gives the value where the field's own key is not set (an unset NeoX key gives
            none).
        no_options: inherited fields that are no YAML keys.
    """

    neox_keys: ClassVar[Mapping[str, str]] = {}
    no_options: ClassVar[tuple[str, ...]] = ()

    hidden_size: int
    num_heads: int
    layer_index: int = 0

    def resolved(self) -> LayerConfig:
        """The same mixer with options that follow from others said, and options without effect at their defaults.

        Two configurations of one mixer compute the same if and only if they are equal after this.
        """
        return self

    def tp_divisor(self) -> int:
        """How many equal parts the layer falls into at most: model_parallel_size must divide this number.

        By default the model's heads. A layer with heads of its own, or with channels instead, overrides it.
        """
        return self.num_heads


@dataclass(frozen=True)
class LayerInputs:
    """What mixers of one kind read of a pass beside the hidden states and the `Context`: base of a mixer's `Inputs`.

    All fields have defaults, which mean "not given"; their names are the keyword arguments of an exported model's `forward`,
    so that no two kinds share one. A tensor among them is [b, s], one value per token of the pass.
    """

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the fields (a dataclass's own record of them, which a compiler can follow, unlike `fields`)."""
        return cls.__match_args__

    def of_pass(self, batch: int, seen: int, length: int) -> LayerInputs:
        """These inputs, given for whole texts, as the pass over their tokens seen .. seen + length - 1 wants them.

        An exported model asks this of what its `forward` is given.

        Args:
            batch: rows.
            seen: tokens per row that earlier passes have read.
            length: tokens of this pass.

        Raises:
            ValueError: a value that cannot be honoured.
        """

        def cut(t: Tensor) -> Tensor:
            if t.dim() != 2 or t.shape[0] != batch or t.shape[1] < seen + length:
                raise ValueError(f"inputs of {type(self).__name__} must be [{batch}, {seen + length}], got {tuple(t.shape)}")
            return t[:, seen : seen + length]

        return self.map(cut)

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerInputs:
        """The same with every tensor changed."""
        values = {name: getattr(self, name) for name in self.names()}
        return type(self)(**{name: change(v) if isinstance(v, Tensor) else v for name, v in values.items()})


InputsOf = TypeVar("InputsOf", bound=LayerInputs)


@dataclass(frozen=True)
class Context:
    """What travels beside the hidden states through all layers of one pass.

    Attributes:
        mask: [b, s], 1 for a token and 0 for padding; None when there is no padding.
        segment_ids: [b, s] integers that grow by one at each document boundary; None when documents are not separated.
        backend: which path of `ops/` to run: auto | reference | torch | triton | fla.
        in_place: `step` may overwrite the states that it is given (buffers of a captured graph), else it leaves them alone.
        attentions: where layers that have attention weights leave them, [b, h, s, keys], when a list is given.
        inputs: what single kinds of mixers read, see `Layer.Inputs`; a mixer gets its own by `ctx.read(kind)`.
    """

    mask: Tensor | None = None
    segment_ids: Tensor | None = None
    backend: str = "auto"
    in_place: bool = False
    attentions: list[Tensor] | None = None
    inputs: tuple[LayerInputs, ...] = ()

    def read(self, kind: type[InputsOf]) -> InputsOf:
        """The inputs of one kind, with every field at its default where the pass brings none."""
        return next((given for given in self.inputs if isinstance(given, kind)), kind())

    def map(self, change: Callable[[Tensor], Tensor]) -> Context:
        """The same pass with every tensor [b, s] changed: other places, another device."""
        mask, ids = (None if t is None else change(t) for t in (self.mask, self.segment_ids))
        return replace(self, mask=mask, segment_ids=ids, inputs=tuple(given.map(change) for given in self.inputs))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Context:
        """The same on another device: what accelerate calls where a model's layers lie on several."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))


class Layer(nn.Module):
    """Base of all token mixers.

    Attributes:
        names: the words that select it in `attention_config`; the first is the prefix of its options.
        uses_heads: whether it reads `num_attention_heads`; a model of mixers that do not needs no such key.
        tp_reductions: sums over the tensor-parallel ranks in one pass; with more than the one in `join`, sequence parallelism
            is refused.
        Config: its options.
        Inputs: what only this mixer reads of a pass, None for nothing.
    """

    names: ClassVar[tuple[str, ...]] = ()
    uses_heads: ClassVar[bool] = True
    tp_reductions: ClassVar[int] = 1
    Config: ClassVar[type[LayerConfig]] = LayerConfig
    Inputs: ClassVar[type[LayerInputs] | None] = None

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.copy_to_tp: nn.Module = nn.Identity()
        self.reduce_from_tp: nn.Module = nn.Identity()

    def forward(self, x: Tensor, ctx: Context, state: State | None = None) -> tuple[Tensor, State | None]:
        """Mix `x [b, s, d]` -> `y [b, s, d]`.

        With `state` (from `init_state` or an earlier call) the pass continues from it and the new state is returned; without,
        the history is empty and None is returned. `s` may be any length: `step` is the fast case s = 1. States that come in are
        never changed in place.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: State, ctx: Context) -> tuple[Tensor, State]:
        """One decode step: `x [b, d]` -> `y [b, d]` and the new state; equal to `forward` on one token.

        With `ctx.in_place` the state may come back as the very tensors that were given, overwritten.
        """
        raise NotImplementedError

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> State:
        """The empty state: named tensors with the batch on dim 0, so that beam search can reorder them all alike.

        A sum over the past is called `recurrent` (or `ssm`), the last inputs of a convolution `conv`: reports of memory go by
        these names (`model/state_size.py`).
        """
        raise NotImplementedError

    def two_way(self, ctx: Context) -> int:
        """Tokens at the start of a row that are read in both directions, 0 for a causal layer.

        The pass that begins a text must hold all of them, and a label among them is one that the model sees.
        """
        return 0

    def set_shard(self, rank: int, size: int) -> None:
        """Learn that this layer holds part `rank` of `size` equal ones; called once, after its parameters were cut.

        Only a layer whose heads differ by their number in the whole model (ALiBi's slopes) needs to know.
        """

    def draws_random(self) -> bool:
        """Whether a pass in training draws random numbers (dropout), which a recomputed pass must draw again."""
        return False

    def plan(self) -> Mapping[str, str]:
        """Parameter name (relative to this layer) -> how it is cut: column | row | heads | replicated."""
        raise NotImplementedError

    def init_rules(self) -> Mapping[str, str]:
        """Parameter name -> initialiser role: input | output | zeros | ones | conv | ..., see `model/init.py`."""
        raise NotImplementedError

    def no_decay(self) -> tuple[str, ...]:
        """Parameters that weight decay leaves alone besides biases and norms."""
        return ()

    def pack_weights(self) -> None:
        """Move parameters that a fused path reads as one to one place in memory; called once, after they have got values."""

    def flops(self, seq_length: int) -> float:
        """Forward floating point operations per token, projections included; a multiply-add counts 2."""
        raise NotImplementedError

    def state_size(self) -> Mapping[str, int]:
        """Elements per sequence of each state tensor, so that the recall-memory dial can be read off a config."""
        return {name: t.numel() for name, t in self.init_state(1, torch.float32, "meta").items()}

    def param_count(self) -> int:
        """Number of parameters of this mixer on one device."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def build(cls, common: Mapping[str, Any], options: Mapping[str, Any]) -> Layer:
        """Make a mixer from the common fields and its own options; unknown options raise TypeError."""
        return cls(cls.Config(**common, **options))


def inputs_of(layers: Iterable[Layer], values: Mapping[str, Any]) -> tuple[LayerInputs, ...]:
    """Values by name as the `Inputs` that the layers of a model declare, one of each kind; None is "not given".

    Everything that runs a model brings inputs this way: training, generation, evaluation, an exported folder.

    Raises:
        ValueError: no layer declares such an input, or the value is none that it takes.
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
