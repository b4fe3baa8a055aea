"""Two tasks by dag.test(), the second of which only starts a process; and what is found outside of them."""

import os

os.environ["AIRFLOW_CTX_DAG_ID"] = os.environ["AIRFLOW_CTX_TASK_ID"] = os.environ["AIRFLOW_CTX_DAG_RUN_ID"] = "leaked"

from airflow_dags.resuming import in_turn, note

from taskckpt.engines import airflow

if __name__ == "__main__":
    note("outside", found=airflow.find())
    for name in ("AIRFLOW_CTX_DAG_ID", "AIRFLOW_CTX_TASK_ID", "AIRFLOW_CTX_DAG_RUN_ID"):
        del os.environ[name]
    in_turn().test()
