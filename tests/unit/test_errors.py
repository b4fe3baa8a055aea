from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

import taskckpt
from taskckpt import errors
from taskckpt.errors import TaskckptError, TaskckptWarning

# Programs look at these words: a line may be added here, none may ever be changed or taken away.
CODES = {
    "TaskckptError": "error",
    "CorruptCheckpointError": "corrupt",
    "UnsafeArchiveError": "unsafe-archive",
    "UnsupportedFormatError": "unsupported-format",
    "StaleAttemptError": "stale-attempt",
    "StillPendingError": "still-pending",
    "SourceChangedError": "source-changed",
    "UnavailableError": "unavailable",
    "StorageFullError": "storage-full",
    "CommitUnknownError": "commit-unknown",
    "DeniedError": "denied",
    "NotFoundError": "not-found",
    "StepNotFoundError": "step-not-found",
    "AlreadyExistsError": "already-exists",
    "StepExistsError": "step-exists",
    "UsageError": "usage",
    "UsageTypeError": "usage-type",
    "NoTaskContextError": "no-task-context",
    "AmbiguousIdentityError": "ambiguous-identity",
    "IdentityMismatchError": "identity-mismatch",
    "MissingDependencyError": "missing-dependency",
}

# What code that has never heard of taskckpt catches.
TWINS = {
    "CorruptCheckpointError": ValueError,
    "StepNotFoundError": ValueError,
    "StepExistsError": ValueError,
    "StillPendingError": TimeoutError,
    "DeniedError": PermissionError,
    "NotFoundError": FileNotFoundError,
    "AlreadyExistsError": FileExistsError,
    "UsageError": ValueError,
    "UsageTypeError": TypeError,
    "MissingDependencyError": ImportError,
    "TaskckptWarning": UserWarning,
}

CLASSES = [cls for cls in vars(errors).values() if inspect.isclass(cls) and cls.__module__ == errors.__name__]
ERRORS = [cls for cls in CLASSES if issubclass(cls, TaskckptError)]

LINE = re.compile(r"    (?P<branches>(?:│   |    )*(?:├── |└── )?)(?P<name>[A-Z]\w+)(?: +\((?P<twin>\w+)\))? ")


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """The drawing in the docstring: each name with its parent and the builtin beside it."""
    assert errors.__doc__ is not None
    found: dict[str, tuple[str | None, str | None]] = {}
    above: list[str] = []
    for line in errors.__doc__.splitlines():
        match = LINE.match(f"{line} ")
        if match is None:
            continue
        depth = len(match["branches"]) // 4
        del above[depth:]
        found[match["name"]] = (above[-1] if above else None, match["twin"])
        above.append(match["name"])
    return found


def test_the_tree_is_as_drawn():
    real = {}
    for cls in CLASSES:
        parents = [base.__name__ for base in cls.__bases__ if base in CLASSES]
        twins = [base.__name__ for base in cls.__bases__ if base not in CLASSES and base is not Exception]
        real[cls.__name__] = (parents[0] if parents else None, twins[0] if twins else None)
        assert len(parents) <= 1
        assert len(twins) <= 1
    assert drawn() == real


def test_codes_are_unique_and_never_change():
    assert {cls.__name__: cls.code for cls in ERRORS} == CODES
    assert len(set(CODES.values())) == len(CODES)
    assert all("code" in vars(cls) for cls in ERRORS), "a class without a code of its own"


@pytest.mark.parametrize("name", TWINS)
def test_builtin_twins(name):
    cls = getattr(errors, name)
    assert issubclass(cls, TWINS[name])
    with pytest.raises(TWINS[name], match="what happened"):
        raise cls("what happened")


@pytest.mark.parametrize("cls", ERRORS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_with_everything(cls, protocol):
    error = cls("what happened", uri="s3://bucket/a", hint="do this")
    error.add_note("seen twice")
    error.attempts = [1, 2]
    for again in pickle.loads(pickle.dumps(error, protocol)), copy.copy(error):
        assert type(again) is cls
        assert (again.message, again.uri, again.hint) == ("what happened", "s3://bucket/a", "do this")
        assert again.__notes__ == ["seen twice"]
        assert again.attempts == [1, 2]
        assert str(again) == str(error)
        assert again.code == CODES[cls.__name__]


@pytest.mark.parametrize("cls", ERRORS)
def test_text_names_uri_and_hint(cls):
    assert str(cls("what happened")) == "what happened"
    error = cls("what happened", uri="s3://bucket/a", hint="do this")
    assert str(error) == "what happened (s3://bucket/a) Hint: do this"
    assert str(cls("no s3://bucket/a here", uri="s3://bucket/a")) == "no s3://bucket/a here"
    assert repr(cls("what happened")) == f"{cls.__name__}('what happened')"


def test_the_package_shows_the_common_ones():
    assert taskckpt.errors is errors
    for name in "StaleAttemptError", "TaskckptError", "TaskckptWarning":
        assert getattr(taskckpt, name) is getattr(errors, name)
    assert issubclass(TaskckptWarning, UserWarning)
