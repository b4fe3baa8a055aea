"""A command of a mapped task: it dies half-way when it starts from zero."""

import json
import os
import sys

import taskckpt
from taskckpt.errors import AmbiguousIdentityError

STEPS = 4


def note(**values):
    with open(os.environ["JOURNAL"], "a") as journal:
        print(json.dumps({"what": "shell", "item": int(sys.argv[1]), **values}), file=journal)


try:
    here = taskckpt.ctx()
except AmbiguousIdentityError as error:
    note(unclear=error.message, hint=error.hint)
    raise
assert here is not None
state = here.checkpoint.load_state_sync() or {"item": int(sys.argv[1]), "step": 0}
note(of=state["item"], resumes_from=state["step"], run=here.run, task=here.task, attempt=here.attempt)
first = state["step"] == 0
while state["step"] < STEPS:
    if first and state["step"] == STEPS // 2:
        os.kill(os.getpid(), 9)
    state["step"] += 1
    here.checkpoint.save_state_sync(state)
