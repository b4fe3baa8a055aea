"""The options that several verbs share, and what becomes of them."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from taskckpt.cli._exits import DECLINED
from taskckpt.cli._output import plain
from taskckpt.cli._targets import Pointer
from taskckpt.errors import UsageError

F = TypeVar("F", bound=Callable[..., None])


def pointing(function: F) -> F:
    """A verb that is told where to look: it gets a ``Pointer`` first, and ``as_json``."""

    @click.option("--base", metavar="PATH|URL", help="Where all tasks lie [default: TASKCKPT_BASE, or ./.taskckpt].")
    @click.option("--run", metavar="NAME", help="Only this run.")
    @click.option("--task", metavar="NAME", help="The task of this name [of the run TASKCKPT_RUN, or local].")
    @click.option("--key", metavar="NAME", help="The task that was named with key=.")
    @click.option(
        "--option",
        "options",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_storage_options,
        help="For the store, such as endpoint_url=http://localhost:9000. JSON is taken as what it says.",
    )
    @click.option(
        "--timeout",
        "timeout_s",
        metavar="SECONDS",
        callback=seconds,
        default="300",
        show_default=True,
        help="How long one request to the store may take.",
    )
    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; errors as JSON on stderr.")
    @click.option("--debug", is_flag=True, help="Tell where an error comes from.")
    @functools.wraps(function)
    def command(debug: bool, options: dict[str, Any], **said: Any) -> None:
        del debug  # looked at where errors end
        where = {name: said.pop(name) for name in ("base", "run", "task", "key", "timeout_s")}
        function(Pointer(None, storage_options=options, **where), **said)

    return command  # type: ignore[return-value]


def seconds(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    """For how long something may take."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise click.BadParameter(f"{plain(text)!r} must be a number of seconds above 0.")
    return number


def seconds_from_0(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    """For a time to wait, which may be none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise click.BadParameter(f"{plain(text)!r} must be a number of seconds from 0 on.")
    return number


def _storage_options(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{plain(text)!r} is not NAME=VALUE.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def split(pointer: Pointer, words: tuple[str, ...], last: str) -> tuple[Pointer, str]:
    """``[TARGET] LAST``: where to look, and the last word."""
    if not 1 <= len(words) <= 2:
        raise click.UsageError(f"Takes [TARGET] {last}: {last} at least, and no more than the two.")
    return replace(pointer, target=words[0] if len(words) == 2 else None), words[-1]


def whole_number(text: str, what: str) -> int:
    """A step as it was written."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise UsageError(f"{what} {plain(text)!r} must be a whole number from 0 on.")
    return int(text)


yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def agree(what: str, *, yes: bool) -> None:
    """Asks before something is done that cannot be undone; ``yes`` was said on the command line.

    Raises:
        UsageError: There is nobody to ask.
        click.exceptions.Exit: The answer was no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("This asks before it does what cannot be undone, and there is no terminal.", hint="Add --yes.")
    click.echo(plain(what), err=True)
    if not click.confirm("Go on?", default=False, err=True):
        click.echo("Nothing was done.", err=True)
        raise click.exceptions.Exit(DECLINED)
