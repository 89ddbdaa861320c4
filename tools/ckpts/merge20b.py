"""GPT-NeoX's command of this name; see pointers.py."""

from pointers import lead

if __name__ == "__main__":
    lead("merge20b")
