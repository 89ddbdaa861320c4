"""GPT-NeoX's command of this name; see pointers.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.ckpts.pointers import lead

if __name__ == "__main__":
    lead("convert_hf_llama_to_neox")
