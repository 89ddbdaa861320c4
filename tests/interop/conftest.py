"""The fixtures of the export tests: checkpoints to export and import, and a private cache of remote code."""

from tests.export.conftest import exported, load_family, make_checkpoint, modules_cache

__all__ = ["exported", "load_family", "make_checkpoint", "modules_cache"]
