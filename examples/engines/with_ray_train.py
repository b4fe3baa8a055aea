"""Ray Train, of which a worker is killed: the workers are started again, and all ranks go on from the last save.

pip install taskckpt 'ray[train]'
python examples/engines/with_ray_train.py

With PyTorch it is the same in ray.train.torch.TorchTrainer. State lies in the experiment's folder: delete that to
start over.
"""

import os
import signal
import tempfile

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.collective import barrier
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

import taskckpt


def train() -> None:
    """Rank 0 saves each step, and dies at 2 the first time."""
    task = taskckpt.ctx()
    assert task is not None
    step = began = int(task.checkpoint.load_bytes_sync() or 0)
    print(f"rank {task.rank} of {task.world_size} resumes from {step}", flush=True)
    barrier()  # rank 0 saves when all have loaded
    while step < 5:
        step += 1  # the work
        if task.rank == 0:  # the other ranks load, and do not save
            task.checkpoint.save_sync(str(step).encode())
            if step == 2 and began == 0:
                os.kill(os.getpid(), signal.SIGKILL)  # once, as a machine may end


if __name__ == "__main__":
    ray.init(num_cpus=3, include_dashboard=False)
    DataParallelTrainer(
        train,
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="counting",
            storage_path=tempfile.mkdtemp(),  # s3://..., or a folder that all machines share
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()
