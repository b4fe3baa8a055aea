"""A step of Dagster that dies, is retried by Dagster and goes on.

    pip install dagster
    python examples/engines/with_dagster.py

``taskckpt.checkpoint()`` in any op or asset does it; the resource says where, beside all the others.
"""

from dagster import Config, DagsterInstance, Definitions, RetryPolicy, asset

from taskckpt.integrations.dagster import CheckpointResource


class Count(Config):
    to: int = 10


@asset(retry_policy=RetryPolicy(max_retries=3))
def count(config: Count, checkpoints: CheckpointResource) -> int:
    cp = checkpoints.checkpoint
    saved = cp.load_sync()
    start = int(saved.read_text()) if saved else 0
    print("resumes from", start, flush=True)
    for done in range(start, config.to):
        if done in (3, 7) and done != start:
            raise RuntimeError(f"dies at {done}")
        cp.save_sync(str(done + 1).encode())
    return config.to


defs = Definitions(assets=[count], resources={"checkpoints": CheckpointResource(base=".taskckpt")})

if __name__ == "__main__":
    with DagsterInstance.ephemeral() as instance:
        run = defs.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance)
        print("counted to", run.output_for_node("count"))
