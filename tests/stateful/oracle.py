"""What a task's checkpoints must be, as lists and sets of labels. Knows nothing of the package."""

from __future__ import annotations

from dataclasses import dataclass, field

CORRUPT = "CORRUPT"
NOTHING = None


@dataclass(eq=False)
class Family:
    """One attempt: a process and its children."""

    name: str
    keep: int | None
    claimed: str = "no"  # "no", "maybe" (a request was lost), "yes"
    commits: int = 0  # since it claimed; one that was perhaps made counts

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False)
class Saved:
    """A save, or a clear (`label` is None), as the store may hold it."""

    label: str | None
    certain: bool = True  # False: its reply was lost, or its process killed
    stays: bool = True  # promised to be there still; False: may be pruned
    damaged: bool = False
    keys: tuple[str, ...] = ()


@dataclass
class Oracle:
    """All that was done, and what may be seen of it."""

    history: list[Saved] = field(default_factory=list)  # newest first
    owners: set[Family] = field(default_factory=set)  # one of them has the task

    # -- who may write ----------------------------------------------------------------------------------

    def may_be_stale(self, family: Family) -> bool:
        if family.claimed == "no":
            return False
        return self.owners != {family}

    def may_succeed(self, family: Family) -> bool:
        return family.claimed != "yes" or family in self.owners

    def took_part(self, family: Family) -> None:
        """An operation of this family succeeded: it has the task."""
        if family.claimed != "yes":
            family.commits = 0
        family.claimed, self.owners = "yes", {family}

    def was_refused(self, family: Family) -> None:
        family.claimed = "yes"
        self.owners.discard(family)

    def may_have_taken_part(self, family: Family) -> None:
        if family.claimed == "no":
            family.claimed = "maybe"
        if family.claimed == "maybe":
            self.owners.add(family)

    # -- what is there ----------------------------------------------------------------------------------

    def saved(self, saved: Saved, family: Family, loaded: str | None) -> None:
        """`loaded`: what the process that saved went on from."""
        if saved.label is None:
            self._cleared(saved)
        else:
            self._prune(saved, family, loaded)
            self.history.insert(0, saved)
            family.commits += 1

    def _cleared(self, saved: Saved) -> None:
        if saved.certain:
            self.history.clear()
        else:
            for older in self.history:
                older.stays = False
        self.history.insert(0, saved)

    def _prune(self, saved: Saved, family: Family, loaded: str | None) -> None:
        if family.keep is None:
            return
        window = self.history[: family.keep - 1]
        before = self.history[0] if self.history else None
        protected = [one for one in self.history if one.label == loaded] if loaded else [before]
        for older in self.history:
            if older in window or older.label is None:
                continue
            first = family.commits == 0 and older in protected and (before is None or before.certain)
            older.stays = older.stays and first

    def loadable(self) -> list[str | None]:
        """All that a load may give now."""
        found: list[str | None] = []
        problems, surely = False, False
        for one in self.history:
            if one.label is None:
                found += [CORRUPT] if surely else [CORRUPT, NOTHING] if problems else [NOTHING]
                if one.certain:
                    return found
            elif one.damaged:
                problems = True
                surely = surely or (one.certain and one.stays)
            else:
                found.append(one.label)
                if one.certain and one.stays:
                    return found
        return [*found, *([CORRUPT] if surely else [CORRUPT, NOTHING] if problems else [NOTHING])]

    def was_loaded(self, label: str | None) -> None:
        """What was perhaps saved above it was not; it was."""
        if label == CORRUPT:
            return
        for number, one in enumerate(self.history):
            if one.label == label and not one.damaged:
                one.certain = True
                above = [other for other in self.history[:number] if other.damaged]
                self.history = above + self.history[number : None if label else number + 1]
                return
            if one.certain and not one.damaged:
                raise AssertionError(f"{label} was loaded, past {one}")
        assert label is NOTHING
        self.history = [one for one in self.history if one.damaged]
