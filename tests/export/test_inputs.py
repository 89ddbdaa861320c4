"""What a transformers user says beside the tokens is honoured by every mixer, or refused by name: never swallowed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from megatron.export.hf import export_checkpoint
from megatron.export.hf_cache import RecurrentCache
from megatron.export.hf_inputs import check_unknown
from megatron.layers.base import Context
from megatron.layers.jrt import PrefixInputs

Make = Callable[..., Path]
LAYERS = {
    "metala": {},
    "hybrid": {
        "layer_types": ("metala", "alibi", "mamba", "sliding", "base_conv", "based"),
        "num_layers": 6,
        "layer_options": {"sliding": {"window": 5}, "based": {"feature_width": 4}},
    },
    "jrt": {"layer_types": ("jrt", "jrt"), "layer_options": {"jrt": {"feature_width": 4, "prefix_length": 3}}},
    "learned": {
        "layer_types": ("global", "metala"),
        "learned_positions": 40,
        "layer_options": {"global": {"positions": "learned"}},
    },
}
CLOSE = 1e-9
"""fp64; the chunked forms round differently from one length to the next."""


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    return {}


@pytest.fixture(params=LAYERS)
def model(request: pytest.FixtureRequest, make_checkpoint: Make, folders: dict[str, Path], tmp_path: Path) -> Any:
    if request.param not in folders:
        folders[request.param] = export_checkpoint(make_checkpoint(**LAYERS[request.param]), tmp_path / "hf").folder
    return AutoModelForCausalLM.from_pretrained(folders[request.param], trust_remote_code=True, dtype=torch.float64).eval()


def text(rows: int, length: int) -> Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def test_every_argument_of_transformers(model: Any) -> None:
    """All that `PreTrainedModel.forward` conventions and `TransformersKwargs` know, at once, changes only what it says."""
    tokens = text(1, 8)
    want = model(tokens).logits
    offsets = torch.tensor([0, 8], dtype=torch.int32)
    out = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        position_ids=torch.arange(8)[None],
        past_key_values=None,
        inputs_embeds=None,
        labels=tokens,
        use_cache=True,
        output_attentions=True,
        output_hidden_states=True,
        output_router_logits=False,
        return_dict=True,
        logits_to_keep=0,
        num_items_in_batch=torch.tensor(7),
        cache=None,
        cu_seq_lens_q=offsets,
        cu_seq_lens_k=offsets,
        max_length_q=8,
        max_length_k=8,
        seq_idx=torch.zeros(1, 8, dtype=torch.int32),
        cache_position=torch.arange(8),
        token_type_ids=torch.zeros_like(tokens),
        is_causal=True,
        cache_params=None,
    )
    assert float((out.logits - want).abs().max()) < CLOSE
    assert out.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(want[0, :-1], tokens[0, 1:]).item())
    assert isinstance(out.past_key_values, RecurrentCache) is False, "classes of a folder are its own"
    assert out.past_key_values is out.cache and out.cache.get_seq_length() == 8
    assert len(out.hidden_states) == len(model.model.layers) + 1 and len(out.attentions) == len(model.model.layers)


@pytest.mark.parametrize("name", ["attentoin_mask", "cache_params", "head_mask", "encoder_hidden_states", "pixel_values"])
def test_unknown_arguments_are_refused_by_name(model: Any, name: str) -> None:
    tokens = text(1, 4)
    for part in (model, model.model):
        with pytest.raises(TypeError, match=f"unknown argument '{name}'"):
            part(tokens, **{name: torch.ones(1, 4)})
    with pytest.raises(TypeError, match="'output_router_logits'"):
        model(tokens, output_router_logits=True)
    assert model(tokens, **{name: None}).logits.shape == (1, 4, 64)


def test_known_arguments_that_say_something_else_are_refused() -> None:
    check_unknown({"cache_position": torch.arange(3, 5), "is_causal": True, "max_length_q": 9}, 3, 2)
    with pytest.raises(ValueError, match=r"cache_position must be 3 \.\. 4"):
        check_unknown({"cache_position": torch.arange(2)}, 3, 2)
    with pytest.raises(ValueError, match="token_type_ids"):
        check_unknown({"token_type_ids": torch.ones(1, 2)}, 0, 2)
    with pytest.raises(ValueError, match="left to right"):
        check_unknown({"is_causal": False}, 0, 2)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_under_both_of_its_names(model: Any, name: str) -> None:
    """transformers up to 5.23 sends past_key_values, 5.24 sends cache: neither may start from an empty state again."""
    tokens = text(2, 12)
    want = model(tokens).logits
    out = model(tokens[:, :9], use_cache=True)
    steps = [out.logits[:, -1]]
    for i in range(9, 12):
        held = getattr(out, name)
        out = model(tokens[:, i : i + 1], use_cache=True, **{name: held})
        assert getattr(out, name) is held
        steps.append(out.logits[:, -1])
    assert held.get_seq_length() == 12
    assert float((torch.stack(steps, 1) - want[:, 8:]).abs().max()) < CLOSE
    with pytest.raises(ValueError, match="two different values"):
        model(tokens[:, :1], past_key_values=held, cache=held.fork())
    with pytest.raises(ValueError, match="batch size"):
        model(tokens[:1, :1], **{name: held})
    full = DynamicCache()
    full.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="holds no recurrent state"):
        model(tokens, **{name: full})


@torch.inference_mode()
def test_generate_reads_each_token_once(model: Any) -> None:
    """Whatever name the installed transformers uses: the state arrives, and steps are one token long."""
    lengths: list[tuple[int, int]] = []
    forward = model.model.forward

    def spy(input_ids: Tensor, *arguments: Any, **named: Any) -> Any:
        out = forward(input_ids, *arguments, **named)
        lengths.append((input_ids.shape[1], out.cache.get_seq_length()))
        return out

    model.model.forward = spy
    made = model.generate(text(2, 5), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    del model.model.forward
    assert lengths == [(5, 5), (1, 6), (1, 7), (1, 8)]
    assert torch.equal(made, model.generate(text(2, 5), max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("mask", "word"),
    [
        (torch.tensor([[1, 1, 2, 2]]), "0 .masked. and 1"),
        (torch.tensor([[0.0, -1e9, 0.0, 0.0]]), "additive"),
        (torch.tensor([[0.5, 1, 1, 1]]), "0 .masked. and 1"),
        (torch.ones(1, 1, 4, 4), r"\[batch, length\]"),
        (torch.ones(1, 3), r"\[batch, length\]"),
        (torch.ones(2, 4), "2 rows for 1 rows"),
        ({"full_attention": torch.ones(1, 4)}, r"\[batch, length\]"),
    ],
)
def test_masks_that_are_not_0_and_1_are_refused(model: Any, mask: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        model(text(1, 4), attention_mask=mask)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float64])
def test_masks_of_any_type(model: Any, dtype: torch.dtype) -> None:
    tokens = text(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    got, alone = model(tokens, attention_mask=mask.to(dtype)).logits, model(tokens[:1, 2:]).logits
    assert float((got[:1, 2:] - alone).abs().max()) < CLOSE
    assert torch.equal(model(tokens, attention_mask=torch.ones(2, 6).to(dtype)).logits, model(tokens).logits)


@torch.inference_mode()
def test_holes_in_a_mask_are_closed(model: Any) -> None:
    """Hidden tokens anywhere, convolutions included: what is shown says what it says without them, in pieces too."""
    tokens = text(3, 14)
    mask = torch.ones_like(tokens)
    mask[0, [0, 3, 4, 9]] = 0
    mask[1, 5:8] = 0
    out = model(tokens, attention_mask=mask, use_cache=True, output_hidden_states=True)
    for row in range(3):
        shown = mask[row].bool()
        alone = model(tokens[row][shown][None], use_cache=True)
        assert float((out.logits[row][shown] - alone.logits[0]).abs().max()) < CLOSE
        for mine, theirs in zip(out.cache.states, alone.cache.states, strict=True):
            for name in theirs:
                if mine[name].shape[1:] == theirs[name].shape[1:] and name != "places":
                    assert float((mine[name][row] - theirs[name][0]).abs().max()) < CLOSE, name
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    if not model.model.two_way({}):  # whose prefix is formed in one pass
        first = model(tokens[:, :6], attention_mask=mask[:, :6], use_cache=True)
        second = model(tokens[:, 6:], attention_mask=mask, cache=first.cache, use_cache=True)
        pieces = torch.cat([first.logits, second.logits], 1)
        assert float(((pieces - out.logits) * mask[..., None]).abs().max()) < CLOSE


def one_by_one(model: Any, rows: list[Tensor]) -> Tensor:
    return torch.cat([model(row[None]).logits[0] for row in rows])


@torch.inference_mode()
def test_documents_in_one_row(model: Any) -> None:
    rows = [text(1, n)[0] for n in (5, 1, 9, 2)]
    want, tokens = one_by_one(model, rows), torch.cat(rows)[None]
    places = torch.cat([torch.arange(len(row)) for row in rows])[None]
    offsets = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)
    numbers = torch.tensor([[0] * 5 + [1] + [2] * 9 + [3] * 2], dtype=torch.int32)
    ways: list[dict[str, Any]] = [
        {"position_ids": places},
        {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 9, "max_length_k": 9},
        {"seq_idx": numbers},
        {"position_ids": places, "cu_seq_lens_q": offsets, "seq_idx": numbers + 3, "attention_mask": torch.ones(1, 17)},
    ]
    for way in ways:
        assert float((model(tokens, **way).logits[0] - want).abs().max()) < CLOSE, list(way)
    after = model(tokens, position_ids=places, use_cache=True).cache
    last = model(rows[-1][None], use_cache=True).cache
    more = text(1, 20)[:, -1:]
    got, alone = (model(more, cache=cache, use_cache=True).logits for cache in (after, last))
    assert float((got - alone).abs().max()) < CLOSE, "what follows continues the last document"


@torch.inference_mode()
def test_documents_in_padded_rows(model: Any) -> None:
    first, second, third = (text(1, n)[0] for n in (4, 6, 7))
    tokens = torch.stack([torch.cat([first, second]), torch.cat([torch.zeros(3, dtype=torch.long), third])])
    mask = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]])
    got = model(tokens, attention_mask=mask, position_ids=places).logits
    assert float((got[0] - one_by_one(model, [first, second])).abs().max()) < CLOSE
    assert float((got[1, 3:] - model(third[None]).logits[0]).abs().max()) < CLOSE


@torch.inference_mode()
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"position_ids": torch.tensor([[0, 1, 3, 4]])}, "skip"),
        ({"position_ids": torch.tensor([[3, 2, 1, 0]])}, "restart at 0"),
        ({"attention_mask": torch.ones(1, 7)}, "7 columns for 4 tokens"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids must be"),
        ({"position_ids": torch.zeros(3, 1, 4, dtype=torch.long)}, "position_ids must be"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "increase from 0 to the 4 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 2, 4])}, "increase from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 3, 4])}, "differ"),
        ({"seq_idx": torch.zeros(1, 5)}, "seq_idx must be"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1]]), "position_ids": torch.arange(4)[None]}, "different positions"),
    ],
)
def test_documents_that_contradict_themselves(model: Any, arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        model(text(1, 4), **arguments)


@torch.inference_mode()
def test_documents_and_a_cache(model: Any) -> None:
    cache = model(text(1, 4), use_cache=True).cache
    with pytest.raises(ValueError, match="holds another document"):
        model(text(1, 4), cache=cache, position_ids=torch.arange(4)[None])
    with pytest.raises(ValueError, match="without a cache"):
        model(text(1, 4), cache=cache, cu_seq_lens_q=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="one flattened row"):
        model(text(2, 4), cu_seq_lens_q=torch.tensor([0, 4]))
    both = text(1, 9)
    places = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    first = model(both[:, :4], position_ids=places[:, :4], use_cache=True)
    second = model(both[:, 4:], position_ids=places[:, 4:], cache=first.cache, use_cache=True)
    if not model.model.two_way({}):  # whose later documents have no prefix in such a pass
        want = model(both, position_ids=places).logits
        assert float((torch.cat([first.logits, second.logits], 1) - want).abs().max()) < CLOSE


@pytest.mark.slow
@torch.inference_mode()
def test_positions_of_a_learned_table_are_not_taken_elsewhere(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = export_checkpoint(make_checkpoint(**LAYERS["learned"]), tmp_path / "hf").folder
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with pytest.raises(ValueError, match="numbers positions itself"):
        model(text(1, 4), position_ids=torch.arange(4)[None] + 2)
    relative = export_checkpoint(make_checkpoint(name="other"), tmp_path / "relative").folder
    plain = AutoModelForCausalLM.from_pretrained(relative, trust_remote_code=True).eval()
    assert torch.equal(plain(text(1, 4), position_ids=torch.arange(4)[None] + 2).logits, plain(text(1, 4)).logits)


@torch.inference_mode()
def test_attentions_are_those_of_the_softmax_layers(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = export_checkpoint(make_checkpoint(layer_types=("metala", "alibi")), tmp_path / "hf").folder
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    tokens = text(2, 6)
    out = model(tokens, output_attentions=True, output_hidden_states=True)
    first, weights = out.attentions
    assert first is None and weights.shape == (2, 2, 6, 6)
    assert float(weights.triu(1).abs().max()) == 0 and float((weights.sum(-1) - 1).abs().max()) < 1e-12
    layer = model.model.layers[1].token_mixer
    x = model.model.layers[1].token_norm(out.hidden_states[1])
    values = layer.v_proj(x).unflatten(-1, (2, -1))
    mixed = layer.out_proj(torch.einsum("bhsn,bnhk->bshk", weights, values).flatten(-2))
    assert float((mixed - layer(x, Context())[0]).abs().max()) < 1e-12
    model.config.output_attentions = model.config.output_hidden_states = True
    assert len(model(tokens).attentions) == 2 and len(model(tokens).hidden_states) == 3
    step = model(tokens[:, :1], cache=model(tokens, use_cache=True).cache)
    assert step.attentions[1].shape == (2, 2, 1, 7)


def test_loss(model: Any) -> None:
    tokens = text(2, 6)
    ignored = torch.full_like(tokens, -100)
    assert (
        float(model(tokens, labels=ignored).loss) == 0 and float(model(tokens, labels=ignored, num_items_in_batch=5).loss) == 0
    )
    whole = model(tokens, labels=tokens).loss
    parts = [model(row[None], labels=row[None], num_items_in_batch=torch.tensor(10)).loss for row in tokens]
    assert float(whole) == pytest.approx(float(sum(parts)), rel=1e-12)
    with pytest.raises(ValueError, match=r"labels must be \(2, 2\) as the logits"):
        model(tokens, labels=tokens, logits_to_keep=2)
    for wrong in (tokens + 64, tokens - 64, tokens.double()):
        with pytest.raises(ValueError, match="labels must be token ids of the 64"):
            model(tokens, labels=wrong)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    padded = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
    rows = [model(row[None], labels=row[None], num_items_in_batch=8).loss for row in (tokens[0, 2:], tokens[1])]
    assert float(padded) == pytest.approx(float(sum(rows)), rel=1e-12), "padding predicts nothing"
    with pytest.raises(ValueError, match="either"):
        model()


def test_the_context_moves_with_a_layer_to_its_device() -> None:
    """accelerate moves what it finds among a layer's arguments by their `to`."""
    inputs = (PrefixInputs(3, torch.ones(1, 2)),)
    ctx = Context(mask=torch.ones(1, 2), segment_ids=torch.zeros(1, 2), backend="torch", inputs=inputs)
    moved = ctx.to("meta", non_blocking=True)
    assert moved.mask is not None and moved.mask.is_meta and moved.segment_ids is not None and moved.segment_ids.is_meta
    own = moved.read(PrefixInputs)
    assert (moved.backend, own.prefix_length) == ("torch", 3) and own.prefix_mask is not None and own.prefix_mask.is_meta


@torch.inference_mode()
def test_without_the_output_matrix(model: Any) -> None:
    body = AutoModel.from_pretrained(model.config._name_or_path, trust_remote_code=True, dtype=torch.float64).eval()
    tokens = text(2, 5)
    hidden = body(tokens).last_hidden_state
    assert float((model.lm_head(hidden) - model(tokens).logits).abs().max()) < CLOSE
    assert torch.equal(body(tokens, return_dict=False)[0], hidden)


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_left_padded_prompts_in_pieces(model: Any, size: int) -> None:
    """A row whose cache holds padding alone begins its text there, with position 0."""
    tokens, mask = text(2, 8), torch.tensor([[1] * 8, [0, 0, 0, 0, 1, 1, 1, 1]])
    common: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    want = model.generate(tokens, **common, eos_token_id=None)
    assert torch.equal(model.generate(tokens, **common, eos_token_id=None, prefill_chunk_size=size), want)


@torch.inference_mode()
def test_what_generate_would_get_wrong_is_refused(model: Any) -> None:
    tokens, common = text(2, 6), {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(tokens, attention_mask=torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]]), **common)
    with pytest.raises(ValueError, match="one document per row; seq_idx"):
        model.generate(tokens, seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1]] * 2), **common)
    for length in (6, 4):
        cache = model(tokens, use_cache=True).cache
        with pytest.raises(ValueError, match=f"has read 6 tokens and the prompt has {length}"):
            model.generate(tokens[:, :length], past_key_values=cache, **common)
    for wrong in (torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="input_ids must have 2 dimensions"):
            model(wrong)


@torch.inference_mode()
def test_stop_strings(model: Any) -> None:
    """`generate` hands its tokenizer on to `forward`, where it has no meaning."""
    assert model(text(1, 4), tokenizer=object(), assistant_tokenizer=object()).logits.shape == (1, 4, 64)


@torch.inference_mode()
def test_prefixes(model: Any) -> None:
    tokens = text(1, 8)
    if "prefix_length" not in model.model.input_names():
        for arguments in ({"prefix_length": 2}, {"prefix_mask": torch.ones(1, 8)}):
            with pytest.raises(TypeError, match="prefix_"):
                model(tokens, **arguments)
        return
    for wrong in (-1, 2.5, "a"):
        with pytest.raises(ValueError, match="prefix_length must be"):
            model(tokens, prefix_length=wrong)
    with pytest.raises(ValueError, match="0 .filler. and 1"):
        model(tokens, prefix_mask=torch.full((1, 8), 0.5))
    filler = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    common: dict[str, Any] = {"prefix_mask": filler, "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    want = model.generate(tokens, pad_token_id=0, **common)
    assert torch.equal(model.generate(tokens, pad_token_id=0, use_cache=False, **common), want)


def test_labels_that_a_prefix_model_sees_are_named(model: Any) -> None:
    tokens, prefix = text(1, 8), model.model.two_way({})
    if prefix:
        with pytest.warns(UserWarning, match="labels inside the prefix of 3 tokens"):
            model(tokens, labels=tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens, labels=tokens, **({"prefix_length": 0} if prefix else {}))
        model(tokens, labels=tokens.masked_fill(torch.arange(8) < 3, -100))


def test_sizes_of_a_configuration_are_not_swallowed(make_checkpoint: Make, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = export_checkpoint(make_checkpoint(**LAYERS["jrt"]), tmp_path / "hf").folder
    with pytest.raises(ValueError, match="num_hidden_layers 1 is not what `architecture` says, 2"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, num_hidden_layers=1)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="hidden_size 64"):
        type(config)(architecture=config.architecture, hidden_size=64)
    metala = export_checkpoint(make_checkpoint(name="other"), tmp_path / "metala").folder
    official = AutoConfig.from_pretrained(metala, trust_remote_code=True)
    assert type(official)(hidden_size=64).decoder_embed_dim == 64
    with pytest.raises(ValueError, match="decoder_layers is 3 and num_hidden_layers"):
        type(official)(decoder_layers=3, num_hidden_layers=4)


def test_embeddings_that_others_put_in(model: Any) -> None:
    own = model.get_input_embeddings()
    plain = torch.nn.Embedding(64, 32, dtype=torch.float64)
    model.set_input_embeddings(plain)
    assert model.get_input_embeddings() is own and own.weight is plain.weight
    assert model(text(1, 4)).logits.shape == (1, 4, 64)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", trainable_token_indices=[3, 4], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    out = adapted(input_ids=text(1, 4), labels=text(1, 4))
    out.loss.backward()
    grown = [n for n, p in adapted.named_parameters() if "trainable_tokens" in n and p.grad is not None]
    assert grown, "the new tokens are trained"
