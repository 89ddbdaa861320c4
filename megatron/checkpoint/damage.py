"""The error that lets a run step back: this checkpoint cannot be used, an older one may.

Another model or a wrong key is a mistake of the user and stops the run; a missing, cut or altered file is not.
"""

from __future__ import annotations

from megatron.errors import CheckpointError


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing, altered, of another save, or cannot be read."""
