"""The verb run: any command, retried, with an environment that says which task and which attempt it is.

The command stays in this process's group, and has its terminal, its standard streams and its other open files. So a
signal of the terminal (Ctrl-C) reaches it without our doing, and only what was sent to this process is handed on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self

import click

from taskckpt._log.catalogue import beginning
from taskckpt._log.history import LogReader
from taskckpt._stores import open_store
from taskckpt._task_context import TaskContext
from taskckpt._testing import switches
from taskckpt.cli._exits import CANNOT_RUN, NO_SUCH_COMMAND, OF_SIGNAL, described
from taskckpt.cli._options import seconds_from_0, whole_number
from taskckpt.cli._output import plain
from taskckpt.cli._targets import Pointer
from taskckpt.cli._who import task_of
from taskckpt.errors import StaleAttemptError, TaskckptError, UsageError

if TYPE_CHECKING:
    from tenacity import RetryCallState

# What is handed on; and which of it means that no more attempts are wanted.
STOPPING = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
HANDED_ON = STOPPING | {signal.SIGUSR1, signal.SIGUSR2}
# Python ignores these; a command expects them as they are.
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)

LOOK_TIMEOUT_S = 20
POLL_S = 0.05


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, metavar="[--] COMMAND...", type=click.UNPROCESSED)
@click.option("--retries", metavar="N", default="3", show_default=True, help="How often to try again.")
@click.option("--key", metavar="NAME", help="The task's name, over all runs.")
@click.option("--task", metavar="NAME", help="Or its name in one run.")
@click.option("--run", metavar="NAME", help="That run [default: TASKCKPT_RUN, the engine's, or local].")
@click.option("--base", metavar="PATH|URL", help="Where all tasks lie [default: TASKCKPT_BASE, or ./.taskckpt].")
@click.option("--keep", metavar="POLICY", help="What stays, as for prune [default: TASKCKPT_KEEP, or 3].")
@click.option(
    "--wait", "wait_s", metavar="SECONDS", callback=seconds_from_0, default="0.5", show_default=True,
    help="Before the second attempt; twice as long before each other one, and a little more by chance.",
)  # fmt: skip
@click.option(
    "--wait-max", "wait_max_s", metavar="SECONDS", callback=seconds_from_0, default="30", show_default=True,
    help="No longer than that.",
)  # fmt: skip
@click.option("--no-retry-on", "final", metavar="CODE", multiple=True, help="An exit code that no retry would change.")
@click.option("--quiet", "-q", is_flag=True, help="Do not tell how attempts begin and end.")
@click.option("--debug", is_flag=True, help="Tell where an error comes from.")
def run(
    command: tuple[str, ...],
    retries: str,
    final: tuple[str, ...],
    wait_s: float,
    wait_max_s: float,
    quiet: bool,
    debug: bool,
    keep: str | None,
    **where: Any,
) -> None:
    """Run a command as a task: try again when it fails, and hand signals and its exit code on.

    Each attempt finds in its environment who it is (TASKCKPT_KEY, or TASKCKPT_RUN and TASKCKPT_TASK; TASKCKPT_ATTEMPT,
    TASKCKPT_BASE), so that taskckpt.checkpoint() in Python, and taskckpt save and load in a shell script, go on where
    the last attempt stopped. All processes of an attempt are one: the newest attempt has the task.
    """
    del debug  # looked at where errors end
    task = task_of(Pointer(**where), keep, command=command)
    if task.place.in_one_process:
        raise UsageError("The base lasts as long as one process, and the command is another one.", uri=task.base)
    tries = _Tries(
        command,
        task,
        1 + whole_number(retries, "--retries"),
        frozenset(whole_number(code, "--no-retry-on") for code in final),
        quiet=quiet,
    )
    raise click.exceptions.Exit(tries.run(wait_s, wait_max_s))


# --- attempts ----------------------------------------------------------------------------------


class _Ended(NamedTuple):
    """How an attempt ended: its exit code as a shell has it, in words, and whether another one is wanted."""

    code: int
    words: str
    again: bool


@dataclass(frozen=True)
class _Tries:
    command: Sequence[str]
    task: TaskContext
    most: int
    final: Collection[int]
    quiet: bool

    def run(self, wait_s: float, wait_max_s: float) -> int:
        """The exit code of the last attempt."""
        import tenacity

        backoff = tenacity.wait_exponential(wait_s, wait_max_s) + tenacity.wait_random(0, wait_s)
        with _Signals() as signals:
            numbers = iter(range(self.most))
            retrying = tenacity.Retrying(
                stop=tenacity.stop_after_attempt(self.most),
                wait=tenacity.wait_none() if switches.instant_retries else backoff,
                retry=tenacity.retry_if_result(lambda ended: ended.again),
                before_sleep=self._tell_next,
                sleep=lambda wait_s: self._wait(signals, wait_s),
                retry_error_callback=_last,
            )
            ended: _Ended = retrying(lambda: self._attempt(next(numbers), signals))
        return ended.code

    def _attempt(self, number: int, signals: _Signals) -> _Ended:
        # A claim of its own: what an earlier attempt left running is fenced.
        current = replace(self.task, attempt=number, _handed_nonce=None)
        self._tell(f"attempt {number + 1} of {self.most} begins")
        child = self._start(current, signals)
        heard: set[int] = set()
        while (code := _exit_code(child)) is None:
            one = signals.next()
            if one is not None and one.number in HANDED_ON:
                heard.add(one.number)
                if not one.from_terminal:
                    self._hand_on(one.number, child)
        ended = self._judge(code, heard)
        self._tell(f"attempt {number + 1} of {self.most} {ended.words}")
        if ended.again:
            _expect_newest(current)
        return ended

    def _hand_on(self, number: int, child: int) -> None:
        try:
            os.kill(child, number)  # not waited for yet: it is no other process's number
        except PermissionError:  # sudo, for instance
            self._tell(f"{_name_of(number)} was not handed on: the command runs as another user")

    def _judge(self, code: int, heard: set[int]) -> _Ended:
        """What becomes of an exit code, after these signals."""
        words = f"ended with exit code {code}" if code >= 0 else f"was killed by {_name_of(-code)}"
        code = code if code >= 0 else OF_SIGNAL - code
        asked = heard & STOPPING or code - OF_SIGNAL in heard
        return _Ended(code, words, again=bool(code) and code not in self.final and not asked)

    def _start(self, current: TaskContext, signals: _Signals) -> int:
        said = current.environ()
        environ = {name: value for name, value in {**os.environ, **said}.items() if value or name not in said}
        program = self.command[0]
        try:
            return os.posix_spawnp(
                program, list(self.command), environ, setsigmask=signals.mask_before, setsigdef=IGNORED_BY_PYTHON
            )
        except FileNotFoundError:
            _cannot(NO_SUCH_COMMAND, f"there is no command {program}, or not what its first line names.")
        except (OSError, ValueError) as error:
            _cannot(CANNOT_RUN, f"{program} cannot be run: {getattr(error, 'strerror', None) or error}.")

    def _wait(self, signals: _Signals, wait_s: float) -> None:
        """Until the next attempt; if it is not wanted any more, this ends here."""
        until = time.monotonic() + wait_s
        while (heard := signals.next(max(0, until - time.monotonic()))) is not None:
            if heard.number in STOPPING:
                self._tell(f"{_name_of(heard.number)}: no more attempts")
                raise click.exceptions.Exit(OF_SIGNAL + heard.number)

    def _tell_next(self, state: RetryCallState) -> None:
        if state.next_action is not None and state.next_action.sleep:
            self._tell(f"attempt {state.attempt_number + 1} of {self.most} follows in {state.next_action.sleep:.1f} s")

    def _tell(self, what: str) -> None:
        if not self.quiet:
            _say(f"taskckpt: {self.task.key or self.task.task}: {what}")


def _last(state: RetryCallState) -> _Ended:
    assert state.outcome is not None
    ended: _Ended = state.outcome.result()
    return ended


def _expect_newest(current: TaskContext) -> None:
    """Another attempt would take the task from a newer one, which would take it back: for ever, or nearly.

    Raises:
        StaleAttemptError: A newer attempt has the task.
    """
    try:
        store = open_store(current.place, storage_options=None, timeout_s=LOOK_TIMEOUT_S)
        owner = beginning(LogReader(store)).owner
    except TaskckptError as error:
        why = described(error)["message"]
        _say(f"warning: whether another attempt has the task is not known: {why}")
        return
    nonce = current._nonce  # noqa: SLF001 - the claim that this attempt's processes share
    if owner is not None and owner.nonce != nonce and nonce in owner.fenced:
        raise StaleAttemptError(
            "Another attempt took the task over while this one ran: no more attempts.",
            uri=current.place.uri,
            hint="One `taskckpt run` for a key at a time; taskckpt show tells who has it.",
        )


def _cannot(code: int, why: str) -> NoReturn:
    _say(f"error: {why}")
    raise click.exceptions.Exit(code)


def _say(what: str) -> None:
    # Whoever read it may have left, and the disk that it goes to may be full: the command is not concerned.
    with suppress(OSError):
        click.echo(plain(what), err=True)


# --- processes and signals ---------------------------------------------------------------------


class _Heard(NamedTuple):
    number: int
    from_terminal: bool


class _Signals:
    """The signals to this process, one after the other: none is lost between two looks, and none interrupts."""

    def __enter__(self) -> Self:
        # What is ignored (nohup, or a job in the background of a script) stays so, for the command too.
        self._waited_for = {one for one in HANDED_ON if signal.getsignal(one) != signal.SIG_IGN} | {signal.SIGCHLD}
        # Where a parent left this ignored, nobody would learn how the command ended.
        self._child_before = signal.signal(signal.SIGCHLD, lambda *_: None)
        self.mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, self._waited_for)
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask_before)
        signal.signal(signal.SIGCHLD, self._child_before or signal.SIG_DFL)

    def next(self, timeout_s: float | None = None) -> _Heard | None:
        """The next one; None if there was none for so long."""
        if hasattr(signal, "sigtimedwait"):
            if timeout_s is None:
                info = signal.sigwaitinfo(self._waited_for)
            elif (found := signal.sigtimedwait(self._waited_for, timeout_s)) is not None:
                info = found
            else:
                return None
            return _Heard(info.si_signo, info.si_code > 0)  # not kill(2), but the kernel: to all in the foreground
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while until is not None and not signal.sigpending() & self._waited_for:  # macOS
            if time.monotonic() >= until:
                return None
            time.sleep(POLL_S)
        number = signal.sigwait(self._waited_for)
        return _Heard(number, number in (signal.SIGINT, signal.SIGQUIT) and _in_foreground())


def _in_foreground() -> bool:
    """Whether this process's group has the terminal: what is typed there reaches all of it."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    finally:
        os.close(terminal)


def _exit_code(child: int) -> int | None:
    """Negative: the signal that killed it. None while it runs. No other process is waited for."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals between the first and the last
        return f"signal {number}"
