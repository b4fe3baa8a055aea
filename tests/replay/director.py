"""Plays a `Schedule` of the model on real attempts, as far as they ask for what it says."""

from __future__ import annotations

from collections.abc import Callable

from tests.model.schedules import Schedule, Step
from tests.replay.stage import Actor, Request, Stage, Verdict

# What an actor may ask on its way to the step that is wanted: it changes nothing that others go by.
HARMLESS = ("list", "read", "size", "stream", "sweep", "delete")
VERDICTS: dict[tuple[str, bool], Verdict] = {
    ("ok", False): "go",
    ("ok", True): "go",
    ("taken", False): "go",
    ("taken", True): "go",
    ("no reply", False): "lose reply",
    ("no reply", True): "deliver later",
    ("no reply, save raises", False): "give up",
    ("no reply, save raises", True): "give up, deliver later",
}
VERBS = {"list": "list", "read": "read", "create": "create", "put": "write", "get": "stream", "list all": "list"}


class Director:
    """`skipped`: the steps for which the real code asked for something else."""

    on_fork: Callable[[Actor, Actor], None] | None = None

    def __init__(self, stage: Stage, schedule: Schedule, *, shift: int = 0, eager: tuple[str, ...] = ()) -> None:
        self.stage = stage
        self.schedule = schedule
        self.shift = shift  # so many slots lie below the story
        self.eager = eager  # they have looked at all that they want to know before others go on
        self.skipped: list[Step] = []

    def play(self) -> Director:
        self._cast()
        for step in self.schedule.steps:
            self._take(step)
        # Who took the last step shows first what came of it.
        self.stage.drain(str(self.schedule.steps[-1][0]))
        while self.stage.late:
            self.stage.deliver()
        self.stage.final()
        return self

    def _cast(self) -> None:
        roles = {name: role for name, _, role in self.schedule.writers}
        for name, script, role in sorted(self.schedule.writers, key=lambda row: roles.get(row[2]) is not None):
            parent = role if role in roles else ""
            verbs = tuple(verb for verb in script.split() if verb != "sweep")  # a part of save
            self.stage.enter(name, verbs, parent=parent, view=role == "view")

    def _take(self, step: Step) -> None:
        who, verb = str(step[0]), str(step[1])
        if verb == "prune ends":
            return
        if verb == "late create":
            names = [name for name, _, _ in self.stage.late]
            if who in names:
                self.stage.deliver(names.index(who))
            return
        if verb == "fork":
            if self.on_fork is not None:
                self.on_fork(self.stage.actors[who], self.stage.actors[str(step[2])])
            return
        actor = self.stage.actors[who]
        if actor.thread is None:
            self.stage.begin(who)
        while not actor.done and actor.pending is not None:
            if self._fits(actor.pending, step):
                self.stage.let_go(who, self._verdict(step, actor.pending))
                self._look_ahead(actor)
                return
            if actor.pending.verb not in HARMLESS or (actor.pending.verb == "delete" and "delete" in verb):
                break
            self.stage.let_go(who)
        self.skipped.append(step)

    def _look_ahead(self, actor: Actor) -> None:
        while actor.name in self.eager and actor.pending is not None and actor.pending.verb in HARMLESS[:-1]:
            self.stage.let_go(actor.name)

    def _verdict(self, step: Step, request: Request) -> Verdict:
        if step[-1] == "fails":
            return "fail"
        if step[1] != "create":
            return "go"
        how = str(step[4])
        if how == "no reply" and step[3] in ("claim", "join"):
            how = "no reply, save raises"  # the log tries an entry again, from the start
        return VERDICTS[how, self.schedule.delayed]

    def _fits(self, request: Request, step: Step) -> bool:
        verb, argument = str(step[1]), step[2] if len(step) > 2 else None
        if verb == "delete payload":
            return request.verb == "delete" and any(self._label(key) == argument for key in request.keys)
        if verb == "delete record":
            assert isinstance(argument, int)
            return request.verb == "delete" and any(
                Request("delete", (key,)).slot == argument + self.shift for key in request.keys
            )
        if verb == "delete all":
            return request.verb == "delete"
        if request.verb != VERBS[verb]:
            return False
        if verb in ("read", "create"):
            assert isinstance(argument, int)
            return request.slot == argument + self.shift
        if verb == "list all":
            return request.keys == ("data",)
        return verb != "list" or request.lists_log

    def _label(self, key: str) -> str | None:
        return {upload.key: upload.label for upload in self.stage.uploads}.get(key)
