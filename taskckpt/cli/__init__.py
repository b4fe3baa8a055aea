"""The command line: looks at checkpoints, checks them, restores them, and tidies up. ``docs/cli.md`` says how."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Generator, Sequence
from typing import Any, NoReturn

import click

from taskckpt.cli import _change, _engines, _look, _pull, _run, _save, _verify
from taskckpt.cli._exits import BROKEN_PIPE, MEANINGS, code_of, tell
from taskckpt.cli._output import notice
from taskckpt.errors import TaskckptWarning

EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items())


class Commands(click.Group):
    """All verbs, with one way to end: what goes wrong in any of them is said, and becomes an exit code, here."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the order of the help
        """In the order in which they are told."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """One verb. That whoever read its output has left is no error: there is nobody to tell."""
        try:
            answer = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # The interpreter flushes once more at its end, and must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.exceptions.Exit(BROKEN_PIPE) from None
        return answer

    def main(self, args: Sequence[str] | None = None, *more: Any, **named: Any) -> NoReturn:
        """Runs one command, and ends the process."""
        _open_closed_streams()
        words = list(sys.argv[1:] if args is None else args)
        own = words[: words.index("--")] if "--" in words else words  # what follows may be a command's
        as_json, debug = "--json" in own, "--debug" in own
        try:
            with _warnings_told(as_json=as_json):
                code = super().main(words, *more, **{**named, "standalone_mode": False})
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - this is the top: nobody else would say it
            tell(error, as_json=as_json, debug=debug)
            code = code_of(error)
        sys.exit(code if isinstance(code, int) else 0)


def _open_closed_streams() -> None:
    """What was closed (``>&-``) is as ``/dev/null``: a file that is opened later must not get its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


@contextlib.contextmanager
def _warnings_told(*, as_json: bool) -> Generator[None]:
    """What the package warns of goes to stderr, a line each."""

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, TaskckptWarning):
            notice(str(message), as_json=as_json)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notice(record.getMessage(), as_json=as_json)

    logger, handler = logging.getLogger("taskckpt"), Handler(logging.WARNING)
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", TaskckptWarning)
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@click.group(
    cls=Commands,
    commands=[
        *(_look.ls, _look.show, _pull.pull, _verify.verify, _change.prune),
        *(_change.rollback, _change.pin, _change.unpin, _change.clear, _look.du),
        *(_engines.engines, _run.run, _save.save, _save.load),
    ],
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="taskckpt", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Look at the checkpoints of tasks, check them, restore them, and tidy up.

    Where to look is said by a path or URL, or by --base, --run, --task and --key. Only rollback and clear take a task
    over from an attempt that runs; all else leaves it alone.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
