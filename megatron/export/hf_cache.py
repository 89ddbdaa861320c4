"""The cache of an exported model: one recurrent state per layer, in the interface that `generate` of transformers expects.

transformers' own recurrent cache layers (`LinearAttentionCacheLayerMixin`) hold one convolution state and one recurrent state.
Ours holds whatever named tensors a mixer has, which is why it stands alone; it is neither croppable nor compilable in
transformers' sense.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.layers.base import State


class RecurrentCache:
    """What `generate` carries from step to step: one state per layer (a dict of tensors, batch on dim 0).

    Its size does not grow with the text, except for layers that keep keys and values. A forward pass replaces the tensors and
    never writes into them, so that a shallow copy (`fork`) is a checkpoint of the conversation.

    Attributes:
        states: per layer, None before the first pass.
        seen: tokens per row that the states have read, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # prompts that begin with what the cache has read are cut by transformers
    is_sliding = (False,)

    def __init__(self, states: list[State] | None = None, seen: int = 0) -> None:
        self.states, self.seen = states, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row that the states have read, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no bound."""
        return -1

    def batch_size(self) -> int | None:
        """Rows, None before the first pass."""
        return None if not self.states else len(next(iter(self.states[0].values())))

    def fork(self) -> RecurrentCache:
        """A second cache that continues from here on its own."""
        return RecurrentCache(None if self.states is None else [dict(state) for state in self.states], self.seen)

    def reset(self) -> None:
        """Forget everything that was read."""
        self.states, self.seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes the old row `beam_idx[i]`, in every tensor of every layer."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order."""
        self.states = [{n: t.index_select(0, indices.to(t.device)) for n, t in s.items()} for s in self.states or []] or None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, neighbours staying together."""
        self.states = [{n: t.repeat_interleave(repeats, 0) for n, t in s.items()} for s in self.states or []] or None

    def crop(self, max_length: int) -> None:
        """Refused: a recurrent state cannot be rolled back.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_ROLLBACK)

    def activate_past_recording(self) -> None:
        """Refused as `crop` is: assisted decoding takes rejected tokens back.

        Raises:
            ValueError: always.
        """
        raise ValueError(_NO_ROLLBACK)


_NO_ROLLBACK = (
    "a recurrent state cannot take tokens back, which assisted decoding needs: neither the main model nor the assistant may be "
    "a linear-attention model; call generate without assistant_model and prompt_lookup_num_tokens"
)


def resolve_cache(past_key_values: Any, cache: Any) -> RecurrentCache | None:
    """The one cache that a call was given under either name of transformers; an empty foreign one is none.

    Raises:
        ValueError: two different caches, or one that holds something this model cannot continue.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument, and two different values were given")
    given = cache if past_key_values is None else past_key_values
    if given is None or isinstance(given, RecurrentCache):
        return given
    length = getattr(given, "get_seq_length", None)
    if length() == 0 if length is not None else not given:
        return None
    raise ValueError(f"a {type(given).__name__} holds no recurrent state; pass the cache that this model returned")
