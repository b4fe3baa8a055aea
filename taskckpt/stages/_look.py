"""What is done and what is out of date, as all stages of a pipeline are at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from taskckpt.errors import UsageError
from taskckpt.stages._stage import Place, Record, Stage
from taskckpt.stages._status import shown
from taskckpt.stages._versions import Done


@dataclass(frozen=True)
class Terms:
    """What a version must have been built from to count.

    Attributes:
        fingerprint: The digest of what the caller gave; None if it gave none.
        after: The stages that it comes after. None: that does not matter.
        any_fingerprint: Which one it was does not matter: it is known when the stage runs.
    """

    fingerprint: str | None = None
    after: tuple[Stage, ...] | None = None
    any_fingerprint: bool = False


# Of a stage of which the code has said nothing yet.
UNDECLARED = Terms(any_fingerprint=True)


class Look:
    """Reads each stage once, when it is asked for.

    Args:
        declared: What the code says of stages, by folder.
    """

    def __init__(self, place: Place, declared: Mapping[str, Terms]) -> None:
        self._place = place
        self._declared = declared
        self._records: dict[str, Record] = {}
        self._reasons: dict[str, str | None] = {}

    def record(self, stage: Stage) -> Record:
        """What the store says of a stage."""
        if stage.folder not in self._records:
            self._records[stage.folder] = stage.read()
        return self._records[stage.folder]

    def usable(self, stage: Stage, terms: Terms | None = None) -> Done | None:
        """The current version, if it is there and not out of date."""
        done = self.record(stage).done
        return None if done is None or self.why_outdated(stage, done, terms) is not None else done

    def why_outdated(self, stage: Stage, done: Done, terms: Terms | None = None) -> str | None:
        """Why a version does not count any more; None if it does. ``terms`` instead of those that are declared."""
        if terms is not None:
            return self._why_outdated(done, terms)
        if stage.folder not in self._reasons:
            self._reasons[stage.folder] = "it comes after itself"  # what who gets here once more will find
            self._reasons[stage.folder] = self._why_outdated(done, self._declared.get(stage.folder, UNDECLARED))
        return self._reasons[stage.folder]

    def _why_outdated(self, done: Done, terms: Terms) -> str | None:
        if not terms.any_fingerprint and terms.fingerprint != done.fingerprint:
            return "its fingerprint changed"
        if terms.after is not None and {one.folder for one in terms.after} != set(done.after):
            return "it comes after other stages now"
        named = {one.folder: one for one in terms.after or ()}
        for folder, version_id in done.after.items():
            before = named.get(folder) or Stage(self._place, folder)
            record = self.record(before)
            if record.done is None:
                return f"{shown(record.name)} is not done"
            if record.done.id != version_id:
                return f"{shown(record.name)} has changed"
            if self.why_outdated(before, record.done) is not None:
                return f"{shown(record.name)} is out of date"
        return None

    def built_from(self, stage: Stage, terms: Terms) -> dict[str, str]:
        """The versions of the stages before it that a new version is built from.

        Raises:
            UsageError: One of them is not done, or out of date.
        """
        found: dict[str, str] = {}
        for before in terms.after or ():
            done = self.usable(before)
            if done is None:
                state = "not done" if self.record(before).done is None else "out of date"
                raise UsageError(
                    f"Stage {stage!r} comes after {before!r}, which is {state}.", hint=f"Run {before!r} first."
                )
            found[before.folder] = done.id
        return found
