"""Dramatiq: the message that this thread works on.

A message keeps its id over retries, and when another worker takes it over from one that is gone. The middleware
``CurrentMessage`` tells which it is. Dramatiq does not add it by itself; without it, the worker's own call tells,
but not in ``async`` actors, which all run in one thread: there it is missed.

What lies: ``retries`` is the same again in a message that was taken over from a worker that is gone (with Redis,
one without a sign of life for a minute). If that worker lives after all, there are two live copies: the newer one
has the task, and the older one ends as a message that is skipped. With the middleware ``Results`` its result is None
until the newer one's is there.

Checked with Dramatiq 2.2.1 and Redis.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from taskckpt.engines._frames import local_of
from taskckpt.engines._task import EngineTask, ending, name_of
from taskckpt.errors import StaleAttemptError


def find() -> EngineTask | None:
    """The task of this thread's message."""
    message, source = _message()
    if message is None:
        return _UNKNOWN if type(threading.current_thread()).__module__ == "dramatiq.asyncio" else None
    return EngineTask(
        "dramatiq",
        run=name_of("dramatiq", message.message_id),
        task=name_of(message.actor_name),
        attempt=message.options.get("retries", 0),
        alone=_is_alone(),
        execution=_execution(message),
        stale=_stale(),
        sources={
            "run": f"{source}.message_id",
            "task": f"{source}.actor_name",
            "attempt": f'{source}.options["retries"], 0 if there is none',
        },
    )


_UNKNOWN = EngineTask(
    "dramatiq",
    run="dramatiq",
    task="unknown",
    ambiguous="An async actor runs here, and nothing tells which message it works on.",
    hint="Add the middleware that tells: broker.add_middleware(dramatiq.middleware.CurrentMessage()); or pass key=.",
)


def _message() -> tuple[Any, str]:
    current = getattr(sys.modules.get("dramatiq.middleware.current_message"), "CurrentMessage", None)
    message = current.get_current_message() if current is not None else None
    if message is not None:
        return message, "CurrentMessage.get_current_message()"
    return local_of("dramatiq.worker", "process_message", "message"), "message"


class _Execution:
    """What a message has for itself until the actor has ended. The message stays on in its thread."""


def _execution(message: Any) -> object:
    broker = getattr(threading.current_thread(), "broker", None) or sys.modules["dramatiq.broker"].global_broker
    if broker is None:  # nobody who could tell when it ends
        return message.message_id, message.options.get("retries", 0)
    with _adding:
        if not any(type(one).__name__ == _ENDED for one in broker.middleware):
            ended = {"after_process_message": _forget, "after_skip_message": _forget}
            broker.add_middleware(type(_ENDED, (sys.modules["dramatiq"].Middleware,), ended)())
    return vars(message).setdefault(_OURS, _Execution())


def _forget(_middleware: Any, _broker: Any, message: Any, **_: Any) -> None:
    vars(message).pop(_OURS, None)


_adding = threading.Lock()
_ENDED = "TaskckptEnded"
_OURS = "_taskckpt_execution"


def _is_alone() -> bool:
    """Whether the worker has one thread. An ``async`` actor runs beside others in any case."""
    workers = [one for one in threading.enumerate() if type(one).__module__ == "dramatiq.worker"]
    return [type(one).__name__ for one in workers].count("WorkerThread") == 1 and threading.current_thread() in workers


def _stale() -> type[StaleAttemptError]:
    middleware = sys.modules.get("dramatiq.middleware")
    return ending(middleware.SkipMessage) if middleware is not None else StaleAttemptError
