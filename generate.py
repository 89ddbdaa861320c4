"""Generate text with a trained model: `python generate.py CONFIG... [-i prompts.txt] [-o out.jsonl]`; flags as in GPT-NeoX.

The checkpoint is that of the config's `load` (else `save`), of any mesh; the model runs in a single process.
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
        raise ConfigError("there is no checkpoint to load", hint="set load, for example --set load=runs/NAME/checkpoints")
    checkpoint = find_checkpoint(folder, run.checkpoint.iteration)
    assert checkpoint is not None  # None only for a fresh training run
    on_gpu = torch.cuda.is_available()
    # half precision is slower than fp32 on CPUs and changes the text
    model, manifest = load_model(checkpoint, dtype=None if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu")
    tokenizer_type = (manifest.facts.get("tokenizer") or {}).get("type")
    tokenizer = stored_tokenizer(checkpoint / "tokenizer", tokenizer_type)
    if tokenizer is None:
        tokenizer_options = run.tokenizer
        tokenizer = build_tokenizer(
            tokenizer_options.tokenizer_type, tokenizer_options.vocab_file, tokenizer_options.merge_file
        )
    options = run.generation
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        maximum_tokens=options.maximum_tokens,
        max_length=run.model.seq_length or None,
        seed=run.training.seed,
        recompute=options.recompute,
        prompt_mode=options.prompt_mode,
        prefix_length=0
        if options.prompt_mode == "plain"
        else model.config.layer_options.get("jrt", {}).get("prefix_length", 0),
        return_logits=options.return_logits,
        backend=run.training.kernel_backend if on_gpu else "auto",
    )
    print(f"checkpoint {checkpoint}, {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    return Writer(model, tokenizer, sampling)


def _kind(run: RunConfig) -> str:
    """The kind of generation: `text_gen_type`; prompts on the command line override a configured one, with a message.

    Raises:
        ConfigError: the command line gives both prompts and a kind without prompts.
    """
    options, origin = run.generation, run.provenance
    kind, source = options.text_gen_type, options.sample_input_file
    if kind is None:
        return "input-file" if source else "unconditional"
    if source is None or kind == "input-file":
        return kind
    command_line_keys = {key for key in ("text_gen_type", "sample_input_file") if str(origin.get(key, "")).startswith("-")}
    if len(command_line_keys) == 2:
        raise ConfigError(f"text_gen_type: {kind} takes no prompts, but {source} holds some", hint="omit one of them")
    if "sample_input_file" in command_line_keys:
        print(f"prompts of {source}, though text_gen_type is {kind} ({origin['text_gen_type']})", file=sys.stderr)
        return "input-file"
    where = origin.get("sample_input_file")
    print(f"{source} is not read ({where}): text_gen_type is {kind}; -i {source} reads it", file=sys.stderr)
    return kind


def generate(run: RunConfig) -> None:
    """Generate according to `text_gen_type`."""
    from megatron.generation import text

    options, kind = run.generation, _kind(run)
    if not options.prompt_end:
        raise ConfigError("prompt_end is empty", why="prompts could not be separated", hint='prompt_end: "\\n"')
    writer = _writer(run)
    if kind == "interactive":
        text.interactive(writer, sys.stdin, sys.stdout, options.prompt_end)
        return
    output = Path(options.sample_output_file)
    if kind == "input-file":
        if options.sample_input_file is None:
            raise ConfigError("text_gen_type: input-file needs sample_input_file", hint="set it with -i")
        source = Path(options.sample_input_file)
        if run.provenance.get("sample_output_file") == "default":
            output = text.default_output(source)
        prompts = text.read_prompts(source, options.prompt_end)
        if blank := prompts.count(""):
            print(f"{blank} of {len(prompts)} prompts are blank: their texts have no context", file=sys.stderr)
        results = writer.continue_texts(prompts)
    else:
        results = text.unconditional(writer, options.num_samples)
    count = text.write_results(results, output)
    print(f"wrote {count} texts to {output}", file=sys.stderr)


def main(argv: list[str]) -> None:
    """The command; under a launcher only rank 0 generates."""
    arguments = make_parser("Generate text with a trained model.").parse_intermixed_args(argv)
    if os.environ.get("RANK", "0") == "0":
        generate(config_from_args(arguments, check=False))


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])
