"""Stages of a pipeline: each runs once, and a pipeline that was killed goes on with the first one that is not done.

A stage is a ``Checkpoint`` of its own, in ``<checkpoint_dir>/<stage>.stage``: its claims give a race one winner, and
its history holds the earlier versions of the stage's result.
"""

from taskckpt.stages._fingerprint import fingerprint_of
from taskckpt.stages._manager import CheckpointManager
from taskckpt.stages._status import StageStatus

__all__ = ["CheckpointManager", "StageStatus", "fingerprint_of"]
