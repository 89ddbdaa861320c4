"""An exported model in the hands of a transformers user: generate, batches, beams, chunks, caches, training, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from megatron.export.hf import export_checkpoint

Make = Callable[..., Path]


@pytest.fixture
def folder(make_checkpoint: Make, tmp_path: Path) -> Path:
    return export_checkpoint(make_checkpoint(), tmp_path / "hf").folder


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[9] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return tokens, mask


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 1, 4, 1, 5], [2, 7]]


def test_left_padded_batch_says_what_single_prompts_say(model: Any) -> None:
    tokens, mask = left_padded(PROMPTS)
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, tokens.shape[1] :]
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert torch.equal(alone, row)


def test_cache_changes_nothing(model: Any) -> None:
    tokens, mask = left_padded(PROMPTS)
    common = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(tokens, **common), model.generate(tokens, use_cache=False, **common))


def test_beam_search_equals_the_one_without_cache(model: Any) -> None:
    tokens, mask = left_padded(PROMPTS)
    common: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 3}
    with_cache = model.generate(tokens, do_sample=False, **common)
    assert with_cache.shape[0] == 12
    assert torch.equal(with_cache, model.generate(tokens, do_sample=False, use_cache=False, **common))


def test_sampling_repeats_with_its_seed(model: Any) -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(torch.tensor([[1, 2]]), max_new_tokens=20, do_sample=True, top_k=0, num_return_sequences=2)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (5, 6, 7, 20), tuple(range(1, 30))])
@torch.inference_mode()
def test_chunked_prefill(model: Any, cuts: tuple[int, ...]) -> None:
    tokens, mask = torch.randint(0, 64, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[1, :6] = 0
    want, cache, parts = model(tokens, attention_mask=mask).logits, None, []
    for start, stop in zip((0, *cuts), (*cuts, 30), strict=True):
        out = model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert cache.get_seq_length() == 30
    assert float((torch.cat(parts, 1) - want).abs().max()) < 1e-10


@torch.inference_mode()
def test_right_padding_leaves_the_state_of_the_last_token(model: Any) -> None:
    short = torch.tensor([[5, 6, 7, 8]])
    want = model(short, use_cache=True).past_key_values
    batch = torch.tensor([[5, 6, 7, 8, 9, 9, 9], [1, 2, 3, 4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    got = model(batch, attention_mask=mask, use_cache=True).past_key_values
    for mine, theirs in zip(got.states, want.states, strict=True):
        for name, value in theirs.items():
            assert float((mine[name][:1] - value).abs().max()) < 1e-12, name


@torch.inference_mode()
def test_caches(model: Any) -> None:
    tokens = torch.randint(0, 64, (2, 6))
    plain = model(tokens).logits
    assert torch.equal(model(tokens, past_key_values=DynamicCache()).logits, plain)
    full = DynamicCache()
    full.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(ValueError, match="no recurrent state"):
        model(tokens, past_key_values=full)
    assert model(tokens, use_cache=False).past_key_values is None
    cache = model(tokens[:, :3], use_cache=True).past_key_values
    fork = cache.fork()
    kept = [{n: t.clone() for n, t in s.items()} for s in fork.states]
    model(tokens[:, 3:], past_key_values=cache)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (6, 3)
    assert all(torch.equal(s[n], k[n]) for s, k in zip(fork.states, kept, strict=True) for n in k)
    with pytest.raises(ValueError, match="batch size"):
        model(tokens[:1], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    model(tokens, past_key_values=cache)


@torch.inference_mode()
def test_optional_outputs(model: Any) -> None:
    tokens = torch.randint(0, 64, (2, 6))
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(model(tokens, logits_to_keep=torch.tensor([0, 4])).logits, out.logits[:, [0, 4]])
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, out.logits)
    assert torch.equal(model(tokens, return_dict=False)[0], out.logits)
    with pytest.raises(ValueError, match="either"):
        model(tokens, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens, attention_mask=torch.ones(2, 3))


def test_loss_and_a_training_step(model: Any) -> None:
    tokens = torch.randint(0, 64, (2, 6))
    labels = tokens.clone()
    labels[0, :3] = -100
    out = model.train()(tokens, labels=labels)
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 64), labels[:, 1:].reshape(-1))
    assert torch.allclose(out.loss, want) and out.past_key_values is None
    summed = model(tokens, labels=labels, num_items_in_batch=16).loss
    assert torch.allclose(summed, want * 8 / 16)
    out.loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_saving_again_is_bit_equal(model: Any, folder: Path, tmp_path: Path) -> None:
    single = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    single.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_metala.py").is_file()
    old, new = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert set(old) == set(new) and all(torch.equal(old[n], new[n]) for n in old)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ours, theirs = (m.config.to_dict() for m in (single, again))
    skipped = {"_name_or_path", "auto_map", "transformers_version"}
    assert {k: v for k, v in ours.items() if k not in skipped} == {k: v for k, v in theirs.items() if k not in skipped}


def test_a_fresh_model_from_the_config(folder: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    mixer = model.requires_grad_(False).model.layers[0].token_mixer
    assert float(mixer.aug_balance.abs().max()) == 0 and float(mixer.g_proj.bias.abs().max()) == 0
    assert 0.015 < float(mixer.q_proj.weight.std()) < 0.025 and 0.015 < float(model.lm_head.weight.std()) < 0.025
    assert float(mixer.conv1d.weight.abs().max()) <= 0.5 and float(mixer.conv1d.weight.std()) > 0.2
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all())


def test_a_conversation_goes_on_from_its_cache(model: Any) -> None:
    first = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    longer = torch.cat([first.sequences, torch.tensor([[8, 9, 10]])], 1)
    want = model.generate(longer, max_new_tokens=5, do_sample=False)
    assert first.past_key_values.get_seq_length() == 7
    got = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, want)
