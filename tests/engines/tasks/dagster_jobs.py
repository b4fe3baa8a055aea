"""Jobs whose steps count, save, die and say what they found; run by the engines of Dagster that the argument names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from dagster import (
    AssetSpec,
    DagsterInstance,
    Definitions,
    DynamicOut,
    DynamicOutput,
    MaterializeResult,
    PipesSubprocessClient,
    ReexecutionOptions,
    RetryPolicy,
    StaticPartitionsDefinition,
    asset,
    execute_job,
    in_process_executor,
    job,
    materialize,
    multi_asset,
    op,
    reconstructable,
)

import taskckpt
from taskckpt import engines
from taskckpt.errors import AmbiguousIdentityError
from taskckpt.integrations.dagster import CheckpointResource

STEPS = 4
RETRIES = RetryPolicy(max_retries=2)
PIPED = Path(__file__).with_name("dagster_piped.py")


def note(what, **values):
    """One line of the journal, from any process."""
    with open(os.environ["JOURNAL"], "a") as journal:
        journal.write(json.dumps({"what": what, "pid": os.getpid(), **values}) + "\n")


def current():
    context = taskckpt.ctx()
    assert context is not None
    return context


def found():
    said = engines.detect()
    assert said is not None
    return {"run": said.run, "task": said.task, "attempt": said.attempt, "base": said.base}


def count(context, die=None, item=None, what="count"):
    """Counts to STEPS; the first attempt dies half-way. What was saved says whose it is."""
    checkpoint = taskckpt.checkpoint()
    state = checkpoint.load_state_sync() or {"item": item, "step": 0}
    note(what, item=item, of=state["item"], resumes_from=state["step"], run_id=context.run_id, **found())
    first = state["step"] == 0
    while state["step"] < STEPS:
        if first and state["step"] == STEPS // 2 and die:
            if die == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConnectionError("half-way")
        state["step"] += 1
        checkpoint.save_state_sync(state)
    return state["step"]


@op(out=DynamicOut())
def items():
    for item in ("a", "b"):
        yield DynamicOutput(item, mapping_key=item)


@op(retry_policy=RETRIES)
def killed(context, item):
    return count(context, "kill" if item == "b" else "raise", item)


@op(retry_policy=RETRIES)
def raised(context, item):
    return count(context, "raise", item)


@op(retry_policy=RETRIES, tags={"dagster/priority": "1"})
def stale():
    checkpoint = taskckpt.checkpoint()
    checkpoint.save_state_sync({"step": 1})
    twin = taskckpt.Checkpoint(current().place.uri)
    twin.load_state_sync()
    note("stale", **found())
    checkpoint.save_state_sync({"step": 2})


CHILD = """
import json, os, taskckpt
with open(os.environ["JOURNAL"], "a") as journal:
    state = taskckpt.checkpoint().load_state_sync()
    print(json.dumps({"what": "child", "task": taskckpt.ctx().task, "state": state}), file=journal)
"""


@op
def parent(before):
    """Its thread and its child process are part of it, although others have run, and failed, in this process."""
    taskckpt.checkpoint().save_state_sync({"step": 7})
    thread = threading.Thread(target=lambda: note("thread", task=current().task))
    thread.start()
    thread.join()
    subprocess.run([sys.executable, "-c", CHILD], check=True)


@op
async def within_loop(context):
    count(context, what="within_loop")


@op
def fails(context):
    count(context, "raise", what="fails")


@op
def starts_unclear(context, pipes: PipesSubprocessClient):
    """No assets: nobody there could tell this step from another one."""
    pipes.run(command=[sys.executable, str(PIPED), "unclear"], context=context)


@op
def dies(context):
    """On each run, after one more step."""
    try:
        checkpoint = taskckpt.checkpoint()
    except AmbiguousIdentityError as error:
        note("unclear", message=error.message, hint=error.hint)
        raise
    state = checkpoint.load_state_sync() or {"step": 0}
    note("dies", resumes_from=state["step"], run_id=context.run_id, **found())
    checkpoint.save_state_sync({"step": state["step"] + 1})
    raise ConnectionError("once more")


@op(retry_policy=RETRIES)
def starts_own(context, pipes: PipesSubprocessClient):
    taskckpt.checkpoint()
    pipes.run(command=[sys.executable, str(PIPED), "own"], context=context, env=current().environ())


@asset(retry_policy=RETRIES, partitions_def=StaticPartitionsDefinition(["p/1", "p2"]))
def piped(context, pipes: PipesSubprocessClient):
    command = [sys.executable, str(PIPED), "piped"]
    return pipes.run(command=command, context=context).get_materialize_result()


@multi_asset(specs=[AssetSpec("x"), AssetSpec("y")], retry_policy=RETRIES)
def several(context, checkpoints: CheckpointResource):
    yield MaterializeResult("x")
    count(context, "raise", what="several")
    assert checkpoints.checkpoint is taskckpt.checkpoint()
    yield MaterializeResult("y")


@job
def killing():
    items().map(killed)


@job(executor_def=in_process_executor)
def raising():
    items().map(raised)
    stale()
    parent(within_loop())


@job(executor_def=in_process_executor)
def failing():
    fails()


@job(executor_def=in_process_executor)
def dying():
    dies()


@job(executor_def=in_process_executor, resource_defs={"pipes": PipesSubprocessClient()})
def piping():
    starts_unclear()
    starts_own()


defs = Definitions(jobs=[dying])


def say(result):
    retried = [event.step_key for event in result.all_events if event.is_step_up_for_retry]
    errors = {
        event.step_key: str(event.event_specific_data.error) for event in result.all_events if event.is_step_failure
    }
    note("run", success=result.success, run_id=result.run_id, retried=sorted(retried), errors=errors)
    return result.run_id


def main():
    with DagsterInstance.get() as instance:
        match sys.argv[1]:
            case "processes":
                say(execute_job(reconstructable(killing), instance))
            case "here":
                say(raising.execute_in_process(instance=instance, raise_on_error=False))
            case "again":
                first = say(execute_job(reconstructable(failing), instance))
                for scope in ("run", "lineage"):
                    os.environ["TASKCKPT_SCOPE"] = scope
                    options = ReexecutionOptions(parent_run_id=first)
                    say(execute_job(reconstructable(failing), instance, reexecution_options=options))
                # As the daemon marks the runs that it starts by itself; the second of them is the third of its root.
                os.environ["TASKCKPT_SCOPE"] = "run"
                parent = say(execute_job(reconstructable(dying), instance))
                for retry in (1, 2):
                    options = ReexecutionOptions(parent_run_id=parent)
                    tags = {"dagster/retry_number": str(retry)}
                    parent = say(execute_job(reconstructable(dying), instance, reexecution_options=options, tags=tags))
            case "assets":
                resources = {"pipes": PipesSubprocessClient(), "checkpoints": CheckpointResource(base=sys.argv[2])}
                say(materialize([several], instance=instance, resources=resources))
            case "pipes":
                resources = {"pipes": PipesSubprocessClient()}
                say(materialize([piped], partition_key="p/1", instance=instance, resources=resources))
                say(piping.execute_in_process(instance=instance, raise_on_error=False))


if __name__ == "__main__":
    main()
