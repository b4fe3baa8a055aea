"""Resumable iterators: the state of a data pipeline, saved and put back, under the names that Datarax gave them.

What counts is the state of the iterator, not how it is made: ``get_state`` and ``set_state``, as those of Datarax and
Grain have them, or ``state_dict`` and ``load_state_dict``, as PyTorch's have them.
"""

from taskckpt.iterators._checkpoints import IteratorCheckpoint, PipelineCheckpoint
from taskckpt.iterators._states import CheckpointableIterator, Resumable, StateCodec, StateHandler

__all__ = [
    "CheckpointableIterator",
    "IteratorCheckpoint",
    "PipelineCheckpoint",
    "Resumable",
    "StateCodec",
    "StateHandler",
]
