"""How a command ends: its exit code, and what is said about an error."""

from __future__ import annotations

import json
import traceback

import click

from taskckpt.cli._output import plain
from taskckpt.errors import (
    AlreadyExistsError,
    CorruptCheckpointError,
    DeniedError,
    NotFoundError,
    StaleAttemptError,
    TaskckptError,
    UnavailableError,
    UnsupportedFormatError,
    UsageError,
)

FAILED = 1
USAGE = 2
CORRUPT = 4
DECLINED = 10
MISSING = 11
CANNOT_RUN = 126  # as shells have it, and so the next
NO_SUCH_COMMAND = 127
OF_SIGNAL = 128  # and the number of the signal that killed it
INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE

# Each group of errors has one code, which never changes.
CODES: tuple[tuple[type[TaskckptError], int], ...] = (
    (UsageError, USAGE),
    (NotFoundError, 3),
    (CorruptCheckpointError, CORRUPT),
    (StaleAttemptError, 5),
    (UnavailableError, 6),
    (DeniedError, 7),
    (UnsupportedFormatError, 8),
    (AlreadyExistsError, 9),
)

MEANINGS = {
    0: "done",
    FAILED: "failed for a reason that has no code of its own",
    USAGE: "the call is wrong, or needs --yes because nobody can be asked",
    3: "there is no such base, task or checkpoint",
    CORRUPT: "something is damaged",
    5: "another attempt took the task over meanwhile",
    6: "the store did not answer as it should, or is full: try again later",
    7: "credentials or permissions are missing",
    8: "a newer taskckpt, or another library, is needed to read it",
    9: "the target folder is not empty",
    DECLINED: "you answered no: nothing was done",
    MISSING: "engines: something is missing for a retry to resume",
    CANNOT_RUN: "run: the command cannot be run",
    NO_SUCH_COMMAND: "run: there is no such command",
    INTERRUPTED: "interrupted (Ctrl-C)",
    BROKEN_PIPE: "whoever read the output left",
}


# What the package says to whoever calls it from Python, and how the command line says it.
WORDS = (
    ("pass replace=True", "add --replace"),
    ("or call clear() to start over", "or start over: taskckpt clear"),
    ("or clear() and start over. pin() keeps", "or start over: taskckpt clear. taskckpt pin keeps"),
    ("Use os.path.expandvars, or write", "Let the shell expand it, or write"),
    ("(storage_options, or", "(--option, or"),
    ("in storage_options", "with --option"),
    ("storage_options do not fit", "--option does not fit"),
    ("and storage_options", "and --option"),
)


def in_words(text: str) -> str:
    """A message or hint, in the words of the command line."""
    for python, words in WORDS:
        text = text.replace(python, words)
    return text


def code_of(error: BaseException) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        return USAGE
    return next((code for kind, code in CODES if isinstance(error, kind)), FAILED)


def described(error: BaseException) -> dict[str, str | None]:
    """An error as ``--json`` says it, on stderr and within a document."""
    if isinstance(error, TaskckptError):
        message = in_words(" ".join((error.message, *getattr(error, "__notes__", ()))))
        hint = None if error.hint is None else in_words(error.hint)
        return {"error": error.code, "message": message, "uri": error.uri, "hint": hint}
    if isinstance(error, click.ClickException):
        return {"error": "usage", "message": error.format_message(), "uri": None, "hint": "taskckpt --help"}
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return {"error": "interrupted", "message": "Interrupted.", "uri": None, "hint": None}
    message = f"{type(error).__name__}: {error}"
    return {"error": "error", "message": message, "uri": None, "hint": "--debug shows where it happened."}


def tell(error: BaseException, *, as_json: bool, debug: bool) -> None:
    """Says on stderr what went wrong: one line, and the traceback before it if that was asked for."""
    if isinstance(error, click.exceptions.Exit):
        return
    if debug:
        traceback.print_exception(error)
    about = described(error)
    if as_json:
        click.echo(json.dumps(about), err=True)
        return
    where = f" ({about['uri']})" if about["uri"] and about["uri"] not in (about["message"] or "") else ""
    hint = f" Hint: {about['hint']}" if about["hint"] else ""
    click.echo(plain(f"error: {about['message']}{where}{hint}"), err=True)
