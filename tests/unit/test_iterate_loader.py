"""``iterate`` over PyTorch's data, in the middle of an epoch: torchdata's ``StatefulDataLoader``."""

from __future__ import annotations

import gc
import importlib.util
from contextlib import suppress
from typing import Any

import pytest

from taskckpt import Checkpoint
from taskckpt.errors import IdentityMismatchError, UsageTypeError

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchdata") is None,
        reason="NOT TESTED with StatefulDataLoader: pip install -r tests/requirements-torch.txt",
    ),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata calls it
    pytest.mark.timeout(90),  # importing torch takes 3 seconds, or 30 on a disk that has never read it
]


class Killed(BaseException):
    pass


def loader(workers, items=20, **options):
    """Each attempt makes its own, and would draw the same shuffles if nothing was restored."""
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    torch.manual_seed(workers)
    data: Any = list(range(items))
    return StatefulDataLoader(data, batch_size=4, shuffle=True, num_workers=workers, **options)


def uninterrupted(workers, epochs, **options):
    source = loader(workers, **options)
    return [batch.tolist() for _ in range(epochs) for batch in source]


OPTIONS = [(0, {}), (0, {"snapshot_every_n_steps": 3}), (2, {}), (2, {"persistent_workers": True})]


@pytest.mark.parametrize(("workers", "options"), OPTIONS)
def test_killed_in_the_middle_of_epochs(workers, options):
    expected = uninterrupted(workers, 2, **options)
    seen = []
    for survives in (2, 4, 0, 99):  # the last batch of an epoch, and the first one of the next, among them
        with suppress(Killed):
            for count, batch in enumerate(Checkpoint("task").iterate(loader(workers, **options), every=1, epochs=2)):
                if count == survives:
                    raise Killed
                seen.append(batch.tolist())
        gc.collect()
    assert seen == expected
    assert len({tuple(map(tuple, seen[:5])), tuple(map(tuple, seen[5:]))}) == 2  # each epoch has its shuffle


@pytest.mark.parametrize("workers", [0, 2])
def test_a_save_in_the_body_and_an_error_in_the_same_process(workers):
    expected = uninterrupted(workers, 2)
    cp, source = Checkpoint("task"), loader(workers)
    seen: list[list[int]] = []
    for fails_at in (3, 7, None):
        with suppress(Killed):
            for batch in cp.iterate(source, epochs=2):
                if len(seen) == fails_at:
                    raise Killed
                seen.append(batch.tolist())
                if len(seen) == 6:
                    cp.save_state_sync({"seen": seen})
    assert seen == expected
    resumed = Checkpoint("task")
    state = resumed.load_state_sync() or {}
    state["seen"] += [batch.tolist() for batch in resumed.iterate(loader(workers), epochs=2)]
    assert state["seen"] == expected


def test_the_end_of_an_epoch_and_one_more_than_before():
    expected = uninterrupted(0, 3)
    seen = [batch.tolist() for batch in Checkpoint("task").iterate(loader(0))]
    for count, batch in enumerate(Checkpoint("task").iterate(loader(0), epochs=3)):
        seen.append(batch.tolist())
        if count == 4:  # the last one of the second epoch: the loader does not know yet that it is
            break
    seen += [batch.tolist() for batch in Checkpoint("task").iterate(loader(0), epochs=3)]
    assert seen == expected


def test_an_iterable_dataset_with_a_state():
    from torch.utils.data import IterableDataset
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Numbers(IterableDataset[int]):
        def __init__(self):
            self.at = 0

        def __iter__(self):
            while self.at < 20:
                self.at += 1
                yield self.at - 1
            self.at = 0

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    seen = []
    for stop in (2, 4, None):
        for batch in Checkpoint("task").iterate(StatefulDataLoader(Numbers(), batch_size=4), epochs=2):
            seen += batch.tolist()
            if len(seen) == (stop or 99) * 4:
                break
    assert seen == [*range(20), *range(20)]


def test_another_batch_size_is_told_apart():
    for _ in Checkpoint("task").iterate(loader(0)):
        break
    with pytest.raises(IdentityMismatchError, match="length was 5, and is 10"):
        next(iter(Checkpoint("task").iterate(loader(0, items=40))))


def test_a_plain_loader_is_refused_with_the_name_of_the_other_one():
    from torch.utils.data import DataLoader

    data: Any = list(range(20))
    with pytest.raises(UsageTypeError, match="StatefulDataLoader takes the same arguments"):
        Checkpoint("task").iterate(DataLoader(data))
