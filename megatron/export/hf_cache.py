"""The cache of an exported model: one recurrent state per layer, with the interface that transformers' `generate` expects.

transformers' own recurrent cache layers (`LinearAttentionCacheLayerMixin`) hold one convolution state and one recurrent state.
Ours holds any named tensors of a mixer, so it does not derive from them; it is neither croppable nor compilable in
transformers' sense.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.layers.base import State


class RecurrentCache:
    """One state per layer (a dict of tensors, batch on dim 0), passed from step to step by `generate`.

    Its size is independent of the text length, except for key/value layers. A forward pass replaces the tensors and
    never writes into them, so a shallow copy (`fork`) is a snapshot of the conversation.

    Attributes:
        states: per layer, None before the first pass.
        seen: tokens read per row, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # transformers trims prompts that begin with the tokens in the cache
    is_sliding = (False,)

    def __init__(self, states: list[State] | None = None, seen: int = 0) -> None:
        self.states, self.seen = states, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read per row, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no bound."""
        return -1

    def batch_size(self) -> int | None:
        """Rows, None before the first pass."""
        return None if not self.states else len(next(iter(self.states[0].values())))

    def fork(self) -> RecurrentCache:
        """An independent copy that continues from the current state."""
        return RecurrentCache(None if self.states is None else [dict(state) for state in self.states], self.seen)

    def reset(self) -> None:
        """Clear the states."""
        self.states, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes the previous row `beam_idx[i]`, in every tensor of every layer."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self.states = [{n: t.index_select(0, indices.to(t.device)) for n, t in s.items()} for s in self.states or []] or None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies adjacent."""
        self.states = [{n: t.repeat_interleave(repeats, 0) for n, t in s.items()} for s in self.states or []] or None

    def crop(self, max_length: int) -> None:
        """Not supported: a recurrent state cannot be rolled back.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_ROLLBACK)

    def activate_past_recording(self) -> None:
        """Not supported, like `crop`: assisted decoding rolls back rejected tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_ROLLBACK)


_NO_ROLLBACK = (
    "a recurrent state cannot be rolled back, which assisted decoding needs: neither the main model nor the assistant may be "
    "a linear-attention model; call generate without assistant_model and prompt_lookup_num_tokens"
)


def resolve_cache(past_key_values: Any, cache: Any) -> RecurrentCache | None:
    """The cache of a call, under either of transformers' argument names; an empty cache of another kind counts as None.

    Raises:
        ValueError: two different caches, or a cache of another kind with content.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, and two different values were given")
    passed = cache if past_key_values is None else past_key_values
    if passed is None or isinstance(passed, RecurrentCache):
        return passed
    length = getattr(passed, "get_seq_length", None)
    if length() == 0 if length is not None else not passed:
        return None
    raise ValueError(f"a {type(passed).__name__} holds no recurrent state; pass the cache that this model returned")
