"""Celery: a task that comes back when its worker is killed, and goes on from its last save.

    @app.task(base=CheckpointedTask, bind=True)
    def train(self, epochs):
        done = int(self.checkpoint.load_bytes_sync() or 0)
        ...

``taskckpt.checkpoint()`` alone does the same in any task that Celery delivers again. This base asks Celery to.
"""

from __future__ import annotations

import celery

import taskckpt


class CheckpointedTask(celery.Task):
    """Acknowledges its message when it has ended, so that no kill of a worker loses it.

    A task that kills its own worker (out of memory, say) is retried, ``max_retries`` times as after an exception:
    delivered again and again it would go on for ever. So it is with a Celery older than 5.7, which cannot do
    that, and with a task that brings down the whole worker with it. There let the task count in what it saves.
    """

    acks_late = True
    reject_on_worker_lost = True
    retry_on_worker_lost = True

    @property
    def checkpoint(self) -> taskckpt.Checkpoint:
        """The checkpoint of the message that is being worked on; ``taskckpt.checkpoint()`` is the same."""
        return taskckpt.checkpoint()
