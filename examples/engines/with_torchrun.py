"""Ranks of torchrun that die, are started again and go on.

    pip install torch
    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/engines/with_torchrun.py

All ranks load, rank 0 saves. torchrun makes an id for each launch: a launch by hand starts afresh, and one with the
same --rdzv-id, or by the same Slurm job, goes on.
"""

import taskckpt


def count(to: int) -> int:
    me = taskckpt.ctx()
    assert me is not None
    saved = me.checkpoint.load_sync()
    start = int(saved.read_text()) if saved else 0
    print("rank", me.rank, "of", me.world_size, "resumes from", start, flush=True)
    # Where ranks work together, a dist.barrier() comes here: all have loaded before one saves.
    for done in range(start, to if me.rank == 0 else 0):
        if done in (3, 7) and done != start:
            raise RuntimeError(f"dies at {done}")
        me.checkpoint.save_sync(str(done + 1).encode())
    return to


if __name__ == "__main__":
    print("counted to", count(10))
