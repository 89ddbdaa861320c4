"""GPT-NeoX checkpoint folder -> checkpoint of ours: `--input global_stepN --config its.yml more.yml --output FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.errors import ExportError, exit_on_error


def main() -> None:
    """Parse the command line, read, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="global_stepN folder of GPT-NeoX, any tensor-parallel size")
    parser.add_argument("--config", nargs="+", required=True, help="the YAML files that the model was trained with")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder to write (`load` of a run)")
    with exit_on_error():
        arguments = parser.parse_args()
        from megatron.checkpoint.save import save_weights
        from megatron.config.load import load_config
        from megatron.export.foreign import load_foreign_pickle
        from megatron.export.neox_checkpoint import read_neox_folder
        from megatron.model.build import param_specs
        from megatron.settings import model_config

        run = load_config(arguments.config, check=False)
        first = arguments.input / "layer_00-model_00-model_states.pt"
        rows = run.tokenizer.padded_vocab_size
        if rows is None and first.is_file():
            ranks = len(list(arguments.input.glob("layer_00-model_*")))
            rows = len(load_foreign_pickle(first)["word_embeddings.weight"]) * ranks
        if rows is None:
            raise ExportError("the number of vocabulary rows is not known", hint="set padded_vocab_size in the YAML")
        config = model_config(run, rows)
        weights = read_neox_folder(arguments.input, config)
        facts = {"imported_from": arguments.input.resolve().name, "seq_length": run.model.seq_length}
        made = save_weights(
            arguments.output, weights, param_specs(config), model_config=config.to_dict(),
            config_texts=dict(run.config_texts), facts=facts,
        )  # fmt: skip
        print(f"wrote {made}: {sum(t.numel() for t in weights.values()):,} parameters")
        print(f"use it: load: {arguments.output}, with finetune: true (it holds weights and no optimizer state)")


if __name__ == "__main__":
    main()
