"""Write text with a trained model: `python generate.py CONFIG... [-i prompts.txt] [-o out.jsonl]`; flags as in GPT-NeoX.

The checkpoint is the one that the config's `load` (else `save`) names, of any mesh; the model runs in this one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.config.cli import config_from_args, make_parser
from megatron.errors import ConfigError, exit_on_error

if TYPE_CHECKING:
    from megatron.config.schema import RunConfig
    from megatron.generation.text import Writer


def _writer(run: RunConfig) -> Writer:
    """Model, tokenizer and sampling of a configuration."""
    import torch

    from megatron.checkpoint.find import find_checkpoint
    from megatron.data.tokenizers import build_tokenizer
    from megatron.generation.load import load_model, stored_tokenizer
    from megatron.generation.sample import Sampling
    from megatron.generation.text import Writer

    folder = run.checkpoint.load or run.checkpoint.save
    if folder is None:
        raise ConfigError("no checkpoint is named", hint="set load, for example --set load=runs/NAME/checkpoints")
    checkpoint = find_checkpoint(folder, run.checkpoint.iteration)
    assert checkpoint is not None  # None is the fresh start of a training run, which needs a save folder
    on_gpu = torch.cuda.is_available()
    # half precision is slower than fp32 on CPUs and changes the text
    model, manifest = load_model(checkpoint, dtype=None if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu")
    kept = (manifest.facts.get("tokenizer") or {}).get("type")
    tokenizer = stored_tokenizer(checkpoint / "tokenizer", kept)
    if tokenizer is None:
        named = run.tokenizer
        tokenizer = build_tokenizer(named.tokenizer_type, named.vocab_file, named.merge_file)
    asked = run.generation
    sampling = Sampling(
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        maximum_tokens=asked.maximum_tokens,
        max_length=run.model.seq_length or None,
        seed=run.training.seed,
        recompute=asked.recompute,
        prompt_mode=asked.prompt_mode,
        prefix_length=0 if asked.prompt_mode == "plain" else model.config.layer_options.get("jrt", {}).get("prefix_length", 0),
        return_logits=asked.return_logits,
        backend=run.training.kernel_backend if on_gpu else "auto",
    )
    print(f"checkpoint {checkpoint}, {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    return Writer(model, tokenizer, sampling)


def _kind(run: RunConfig) -> str:
    """What is asked for: `text_gen_type`, which prompts named on the command line beat, and which is said otherwise.

    Raises:
        ConfigError: the command line names prompts and a kind that takes none.
    """
    asked, origin = run.generation, run.provenance
    kind, source = asked.text_gen_type, asked.sample_input_file
    if kind is None:
        return "input-file" if source else "unconditional"
    if source is None or kind == "input-file":
        return kind
    typed = {key for key in ("text_gen_type", "sample_input_file") if str(origin.get(key, "")).startswith("-")}
    if len(typed) == 2:
        raise ConfigError(f"text_gen_type: {kind} takes no prompts, and {source} holds some", hint="leave one of them out")
    if "sample_input_file" in typed:
        print(f"prompts of {source}, though text_gen_type is {kind} ({origin['text_gen_type']})", file=sys.stderr)
        return "input-file"
    where = origin.get("sample_input_file")
    print(f"{source} is not read ({where}): text_gen_type is {kind}; -i {source} reads it", file=sys.stderr)
    return kind


def generate(run: RunConfig) -> None:
    """Do what `text_gen_type` says."""
    from megatron.generation import text

    asked, kind = run.generation, _kind(run)
    if not asked.prompt_end:
        raise ConfigError("prompt_end is empty", why="nothing would tell one prompt from the next", hint='prompt_end: "\\n"')
    writer = _writer(run)
    if kind == "interactive":
        text.interactive(writer, sys.stdin, sys.stdout, asked.prompt_end)
        return
    output = Path(asked.sample_output_file)
    if kind == "input-file":
        if asked.sample_input_file is None:
            raise ConfigError("text_gen_type: input-file needs sample_input_file", hint="give it with -i")
        source = Path(asked.sample_input_file)
        if run.provenance.get("sample_output_file") == "default":
            output = text.default_output(source)
        prompts = text.read_prompts(source, asked.prompt_end)
        if blank := prompts.count(""):
            print(f"{blank} of {len(prompts)} prompts are blank: their texts start from nothing", file=sys.stderr)
        results = writer.continue_texts(prompts)
    else:
        results = text.unconditional(writer, asked.num_samples)
    count = text.write_results(results, output)
    print(f"wrote {count} texts to {output}", file=sys.stderr)


def main(argv: list[str]) -> None:
    """The command; only the first process works when a launcher started several."""
    arguments = make_parser("Write text with a trained model.").parse_intermixed_args(argv)
    if os.environ.get("RANK", "0") == "0":
        generate(config_from_args(arguments, check=False))


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
