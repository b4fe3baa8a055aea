"""How many checkpoints stay, where each save says it anew, and none goes before what replaces it was read back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from taskckpt import _payload
from taskckpt._arguments import Target
from taskckpt._chain import Loadable
from taskckpt._checkpoint import Checkpoint
from taskckpt._keep import Candidate, KeepPolicy, LatestN, text_of
from taskckpt._log.records import Commit
from taskckpt._operation import Stop
from taskckpt._progress import Report
from taskckpt._selection import of_slot
from taskckpt._stores import Store
from taskckpt.errors import CorruptCheckpointError, StepNotFoundError

if TYPE_CHECKING:
    from taskckpt._pending import PendingSave


class _Newest(KeepPolicy):
    """The newest ``n``, where each save says how many; None for all."""

    n: int | None = None

    @property
    def reach(self) -> int | None:
        return self.n

    def picks(self, newest_first: Sequence[Candidate]) -> Iterable[tuple[int, str]]:
        return LatestN(len(newest_first) or 1 if self.n is None else self.n).picks(newest_first)

    def __str__(self) -> str:
        return text_of(None if self.n is None else LatestN(self.n))


class Retention:
    """What is older goes only after what is new was read back: until then, one more stays for each that is new.

    Args:
        place: Where ``checkpoint`` saves to.

    Attributes:
        checkpoint: To save with, between ``begin`` and ``end``.
        pending: What goes on in the background.
    """

    def __init__(self, place: Target) -> None:
        self._policy = _Newest()
        self.checkpoint = Checkpoint(place, keep=self._policy)
        self.pending: list[PendingSave] = []
        self._view = Checkpoint(place, read_only=True)
        self._keep: int | None = None
        self._unchecked = 0

    def begin(self, keep: int | None) -> None:
        """One more will be saved."""
        still_pending = [save for save in self.pending if not save.done()]
        have_ended = len(still_pending) < len(self.pending)
        self.pending = still_pending
        if have_ended:
            self._read_back()
            self._unchecked = len(still_pending)
        self._keep = keep
        self._unchecked += 1
        self._policy.n = None if keep is None else keep + self._unchecked

    def end(self) -> None:
        """All that began is saved."""
        self.pending.clear()
        if self._unchecked == 0:
            return
        self._read_back()
        self._unchecked = 0
        if self._keep is not None:
            self._policy.n = self._keep
            self.checkpoint.prune_sync()

    @property
    def newest(self) -> Commit | None:
        """What was committed last, as far as this process knows."""
        log = self.checkpoint._attempt._log  # noqa: SLF001 - a listing leaves out a damaged record; its writer does not
        return None if log is None else log.newest

    def _read_back(self) -> None:
        """The newest: it stands for those before it."""
        newest = self.newest
        if self._keep is None or newest is None:
            return  # nothing goes, or nothing was saved
        try:
            self._view._read(Stop(), of_slot(newest.stamp.slot), _read_to_its_end, None)  # noqa: SLF001
        except (CorruptCheckpointError, StepNotFoundError) as error:  # the latter if the record itself is damaged
            raise CorruptCheckpointError(
                f"What was saved just now cannot be read back as it was: {error.message}",
                uri=error.uri,
                hint="What is older is still there. Look for a disk that fails, and save again.",
            ) from error


def _read_to_its_end(store: Store, found: Loadable, stop: Stop, _: Report | None) -> None:
    _payload.verify(store, found, stop)
