"""A task of Airflow that dies, is retried by Airflow and goes on.

    pip install apache-airflow
    export AIRFLOW__CORE__DAGS_FOLDER=$PWD/examples/engines
    airflow db migrate
    python examples/engines/with_airflow.py

With workers on several hosts set TASKCKPT_BASE to a place that all of them share.
"""

from airflow.sdk import dag, task

import taskckpt


@task(retries=3, retry_delay=1)
def count(to: int) -> int:
    cp = taskckpt.checkpoint()
    saved = cp.load_sync()
    start = int(saved.read_text()) if saved else 0
    print("resumes from", start, flush=True)
    for done in range(start, to):
        if done in (3, 7) and done != start:
            raise RuntimeError(f"dies at {done}")
        cp.save_sync(str(done + 1).encode())
    print("counted to", to, flush=True)
    return to


@dag(schedule=None)
def counting() -> None:
    count(to=10)


example = counting()

if __name__ == "__main__":
    example.test()
