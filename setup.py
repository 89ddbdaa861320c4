"""What pyproject.toml cannot say: a wheel carries commands, `tools/`, `configs/` and published scores.

They go into `megatron/shipped/`, laid out as in the checkout, where `megatron/shipped.py` looks for them. An editable install
uses the checkout's own.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
COMMANDS = ("deepy.py", "train.py", "generate.py", "eval.py", "prepare_data.py")
FOLDERS = {"configs": (".yml", ".md", ".json"), "tools": (".py",), "benchmarks/published": (".csv",)}
LEFT_OUT = {"bench", "compat", "compatibility.py", "__pycache__"}  # of developing, not of using


class BuildWithCommands(build_py):
    """Adds the shipped files to the package."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        if self.editable_mode:
            return
        files = [ROOT / name for name in COMMANDS]
        for folder, endings in FOLDERS.items():
            inner = sorted((ROOT / folder).rglob("*"))
            files += [f for f in inner if f.suffix in endings and not LEFT_OUT & set(f.relative_to(ROOT).parts)]
        for file in files:
            target = Path(self.build_lib) / "megatron" / "shipped" / file.relative_to(ROOT)
            self.mkpath(str(target.parent))
            self.copy_file(str(file), str(target))


setup(cmdclass={"build_py": BuildWithCommands})
