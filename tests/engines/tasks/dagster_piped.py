"""What a step starts with Dagster Pipes: it counts, and dies half-way when it starts from zero."""

import json
import os
import sys

from dagster_pipes import open_dagster_pipes

import taskckpt
from taskckpt.engines import dagster_pipes
from taskckpt.errors import AmbiguousIdentityError

STEPS = 4


def main():
    assert dagster_pipes.find() is None
    with open_dagster_pipes():
        try:
            here = taskckpt.ctx()
        except AmbiguousIdentityError as error:
            note(unclear=error.message, hint=error.hint)
            raise
        assert here is not None
        checkpoint = taskckpt.checkpoint()
        state = checkpoint.load_state_sync() or {"step": 0}
        note(run=here.run, task=here.task, attempt=here.attempt, resumes_from=state["step"])
        first = state["step"] == 0
        while state["step"] < STEPS:
            if first and state["step"] == STEPS // 2:
                os.kill(os.getpid(), 9)
            state["step"] += 1
            checkpoint.save_state_sync(state)
    assert dagster_pipes.find() is None


def note(**values):
    with open(os.environ["JOURNAL"], "a") as journal:
        print(json.dumps({"what": sys.argv[1], **values}), file=journal)


main()
