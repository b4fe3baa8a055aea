"""Every error and warning of taskckpt, grouped by what a handler would do about it.

    TaskckptError
    ├── CorruptCheckpointError        (ValueError) something was saved, and no copy of it is intact
    │   └── UnsafeArchiveError        an archive that would write, link or grow beyond what it may
    ├── UnsupportedFormatError        intact, but this version of taskckpt or of a library cannot read it: upgrade
    ├── StaleAttemptError             a newer attempt holds the task: stop this one
    ├── StillPendingError             (TimeoutError) a save in the background takes longer than you wait
    ├── SourceChangedError            the file or folder changed while it was saved: save again
    ├── UnavailableError              the store did not answer as it should: trying again may help
    │   ├── StorageFullError          no room left where the bytes should go
    │   └── CommitUnknownError        the store never said whether the save counts
    ├── DeniedError                   (PermissionError) credentials or permissions are missing
    ├── NotFoundError                 (FileNotFoundError) a bucket, base or task that is not there
    │   └── StepNotFoundError         (ValueError) no checkpoint of that step, metadata or metric
    ├── AlreadyExistsError            (FileExistsError) the target is taken
    │   └── StepExistsError           (ValueError) a checkpoint of that step is there already
    └── UsageError                    (ValueError) the call itself is wrong
        ├── UsageTypeError            (TypeError) an argument of a type that is not taken
        ├── NoTaskContextError        nobody said which task this is
        ├── AmbiguousIdentityError    several tasks would share one identity
        ├── IdentityMismatchError     the state belongs to another iteration, source or configuration
        └── MissingDependencyError    (ImportError) an optional package is not installed

    TaskckptWarning                   (UserWarning) something works, but not as you may think

"No checkpoint yet" is not an error: ``load`` gives ``None``, and only after a listing that succeeded.
"""

from __future__ import annotations

from typing import Any, ClassVar


class TaskckptError(Exception):
    """Base of all errors of taskckpt.

    Attributes:
        code: A word for programs that never changes between releases.
        uri: What the error is about (a URI or a local path), or None.
        hint: What to do about it, or None.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, uri: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.uri = uri
        self.hint = hint

    def __str__(self) -> str:
        text = self.message
        if self.uri is not None and self.uri not in text:
            text += f" ({self.uri})"  # in brackets a path would be taken for markup by loggers that know some
        if self.hint is not None:
            text += f" Hint: {self.hint}"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle as cls(*args), which would lose the keyword-only fields.
        return _rebuild, (type(self), self.message, self.uri, self.hint, dict(self.__dict__))


def _rebuild(
    cls: type[TaskckptError], message: str, uri: str | None, hint: str | None, state: dict[str, Any]
) -> TaskckptError:
    error = cls(message, uri=uri, hint=hint)
    error.__dict__.update(state)
    return error


class CorruptCheckpointError(TaskckptError, ValueError):
    """Something was saved, and no copy of it is intact. Never read as "no checkpoint"."""

    code = "corrupt"


class UnsafeArchiveError(CorruptCheckpointError):
    """An archive holds what taskckpt never writes: names that climb out, devices, bombs and the like."""

    code = "unsafe-archive"


class UnsupportedFormatError(TaskckptError):
    """The newest checkpoint is intact, but needs a newer taskckpt, or other versions of libraries, to be read."""

    code = "unsupported-format"


class StaleAttemptError(TaskckptError):
    """A newer attempt took the task over. Final for this process: end it, do not retry it."""

    code = "stale-attempt"


class StillPendingError(TaskckptError, TimeoutError):
    """A save in the background has not ended within the time given. It goes on: wait again."""

    code = "still-pending"


class SourceChangedError(TaskckptError):
    """The file or folder to be saved kept changing while it was read; nothing was saved."""

    code = "source-changed"


class UnavailableError(TaskckptError):
    """The store could not be reached, or answered with a passing fault, after bounded retries."""

    code = "unavailable"


class StorageFullError(UnavailableError):
    """The disk or the quota is full where the bytes should go."""

    code = "storage-full"


class CommitUnknownError(UnavailableError):
    """The store never told whether a save counts. The next save of this process settles it first."""

    code = "commit-unknown"


class DeniedError(TaskckptError, PermissionError):
    """Credentials or permissions are missing or wrong."""

    code = "denied"


class NotFoundError(TaskckptError, FileNotFoundError):
    """A bucket, a base, a task or a file that must be there is not."""

    code = "not-found"


class StepNotFoundError(NotFoundError, ValueError):
    """No checkpoint is there of that step, or with that metadata or metric; the hint lists the steps there are."""

    code = "step-not-found"


class AlreadyExistsError(TaskckptError, FileExistsError):
    """The target is taken: an object that must not be overwritten, or a folder that is not empty."""

    code = "already-exists"


class StepExistsError(AlreadyExistsError, ValueError):
    """An intact checkpoint of that step is there already, and ``overwrite`` was not asked for."""

    code = "step-exists"


class UsageError(TaskckptError, ValueError):
    """The call itself is wrong; the message says what would be right."""

    code = "usage"


class UsageTypeError(UsageError, TypeError):
    """An argument has a type that is not taken."""

    code = "usage-type"


class NoTaskContextError(UsageError):
    """Nobody said which task this is."""

    code = "no-task-context"


class AmbiguousIdentityError(UsageError):
    """Several tasks would share one identity; pass ``key=``."""

    code = "ambiguous-identity"


class IdentityMismatchError(UsageError):
    """A saved state belongs to another iteration: of another source, shuffle, number of workers or fingerprint."""

    code = "identity-mismatch"


class MissingDependencyError(UsageError, ImportError):
    """An optional package is not installed; the hint names the extra that brings it."""

    code = "missing-dependency"


class TaskckptWarning(UserWarning):
    """Something works, but perhaps not as you think: read it once, then decide."""
