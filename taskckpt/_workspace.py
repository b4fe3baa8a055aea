"""Where checkpoints are restored to: private folders that live as long as this process, or the user's own."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable

from taskckpt._layout import LOG, parse_slot_name
from taskckpt._stores.local import translating
from taskckpt.errors import AlreadyExistsError, UsageError

PREFIX = "taskckpt-"
LOCK = ".lock"

Fill = Callable[[str], None]

_lock = threading.RLock()  # a signal handler may load while the code that it interrupted is here
_root: str | None = None
_root_pid = 0
_descriptor = -1


def _after_fork() -> None:
    # The child inherits the parent's folder to read from, but makes its own and never removes the parent's.
    global _lock, _root
    _lock, _root = threading.RLock(), None


os.register_at_fork(after_in_child=_after_fork)


def process_root() -> str:
    """This process's private folder; removed when it ends, and by a later process if it was killed."""
    global _root, _root_pid, _descriptor
    with _lock:
        if _root is not None and not os.path.isdir(_root):  # a cleaner of old temporary files was here
            os.close(_descriptor)
            _root = None
        if _root is None:
            parent = os.path.abspath(os.environ.get("TASKCKPT_TMP") or tempfile.gettempdir())
            with translating(parent):
                os.makedirs(parent, exist_ok=True)
                _remove_abandoned(parent)
                _root, _descriptor = _make_root(parent)
            _root_pid = os.getpid()
            atexit.register(_remove_at_exit, _root, _root_pid)
        return _root


def _make_root(parent: str) -> tuple[str, int]:
    # Locked before it gets its name, so that nobody takes it for an abandoned one.
    hidden = tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent)
    descriptor = os.open(f"{hidden}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    root = f"{parent}/{PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
    os.rename(hidden, root)
    return root, descriptor


def _remove_abandoned(parent: str) -> None:
    """Removes the folders of processes that were killed: the kernel has released their locks."""
    for name in os.listdir(parent):
        path = f"{parent}/{name}"
        if not name.startswith(PREFIX):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, somebody else's, or in use: leave it
            if os.lstat(path).st_uid != os.getuid():
                continue
            descriptor = os.open(f"{path}/{LOCK}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(path)
            finally:
                os.close(descriptor)


def _remove_at_exit(root: str, pid: int) -> None:
    if os.getpid() == pid:
        remove_tree(root)


def remove_tree(path: str) -> None:
    """Removes a tree, read-only folders in it too; what cannot be removed stays. Nothing outside is touched."""

    def retry(function: Callable[[str], object], failed: str, _: object) -> None:
        folder = failed if os.path.isdir(failed) and not os.path.islink(failed) else os.path.dirname(failed)
        for locked in (os.path.dirname(failed), folder):
            if locked == path or locked.startswith(f"{path}/"):
                with contextlib.suppress(OSError):
                    os.chmod(locked, stat.S_IRWXU)
        if function in (os.unlink, os.rmdir):
            with contextlib.suppress(OSError):
                function(failed)

    shutil.rmtree(path, onerror=retry)
    if os.path.isdir(path):  # a folder that could not be opened then can be now
        shutil.rmtree(path, onerror=retry)


def restore_fresh(fill: Fill) -> str:
    """A new private folder, filled: it gets its name only when ``fill`` has returned."""
    root = process_root()
    number = secrets.token_hex(6)
    staging, final = f"{root}/.{number}", f"{root}/{number}"
    with translating(staging):
        os.mkdir(staging, 0o700)
    _fill(staging, fill)
    with translating(final):
        os.rename(staging, final)
    return final


def restore_into(folder: str, fill: Fill, *, replace: bool) -> None:
    """Fills the user's own folder: what is there is touched only when everything new is complete beside it.

    Raises:
        AlreadyExistsError: It is not empty, and ``replace`` is not set.
        UsageError: It is a file, or what is in it must not be replaced.
    """
    with translating(folder):
        target = os.path.realpath(folder)
        _expect_free(target, replace=replace)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        staging = _staging_beside(target)
    _fill(staging, fill)
    try:
        with translating(target):
            _expect_free(target, replace=replace, but=os.path.basename(staging))
            if os.path.dirname(staging) == target:
                _move_inside(staging, target)
            else:
                _swap(staging, target)
    except BaseException:
        remove_tree(staging)
        raise


def _fill(staging: str, fill: Fill) -> None:
    try:
        fill(staging)
    except BaseException:
        remove_tree(staging)
        raise


def _expect_free(target: str, *, replace: bool, but: str = "") -> None:
    if not os.path.lexists(target):
        return
    if not os.path.isdir(target):
        raise UsageError("load(to=...) takes a folder, and this is a file.", uri=target)
    if not set(os.listdir(target)) - {but}:
        return
    if not replace:
        raise AlreadyExistsError(
            "The folder is not empty.", uri=target, hint="Choose another one, or pass replace=True."
        )
    _expect_replaceable(target)


def _expect_replaceable(target: str) -> None:
    """Replacing deletes, so a slip of the pen must not cost a home, a working folder or another disk."""
    for what, path in (("the current folder", os.getcwd()), ("the home folder", os.path.expanduser("~"))):
        if contains(target, os.path.realpath(path)):
            raise UsageError(f"{what.capitalize()} would be replaced.", uri=target, hint="Name a subfolder.")
    inside = [mount for mount in _mount_points() if mount != target and contains(target, mount)]
    if inside:
        raise UsageError(
            f"The folder has a mount point in it, {inside[0]}, which cannot be replaced.",
            uri=target,
            hint="Name a folder without one.",
        )


def place_around(folder: str) -> str | None:
    """The task's place that this folder is or lies in, if there is one."""
    while True:
        if _is_place(folder):
            return folder
        above = os.path.dirname(folder)
        if above == folder:
            return None
        folder = above


def _is_place(folder: str) -> bool:
    try:
        with os.scandir(os.path.join(folder, LOG)) as entries:
            return any(parse_slot_name(entry.name) is not None for entry in entries)
    except OSError:  # none, no folder, or closed to us: then nothing of it can be replaced either
        return False


def contains(folder: str, path: str) -> bool:
    """Whether ``path`` is ``folder`` or lies below it; both are real paths."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mount_points() -> list[str]:
    """Where file systems are mounted: told by Linux; elsewhere a rename over a mount point fails by itself."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            return [_unescaped(line.split(" ")[4]) for line in file]
    except FileNotFoundError:
        return []


def _unescaped(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def _staging_beside(target: str) -> str:
    """An empty folder on the same disk: beside the target, or inside it where that cannot be renamed."""
    name = f".{PREFIX}{secrets.token_hex(6)}"
    beside = os.path.join(os.path.dirname(target), name)
    if not os.path.ismount(target) and target not in (os.path.realpath(os.getcwd()), *_mount_points()):
        try:
            os.mkdir(beside, 0o700)
        except PermissionError:
            if not os.path.isdir(target):
                raise
        else:
            return beside
    inside = os.path.join(target, name)
    os.mkdir(inside, 0o700)
    return inside


def _swap(staging: str, target: str) -> None:
    old = f"{staging}-old"
    try:
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(staging, target)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(target):
            os.rename(old, target)
        raise
    if os.path.lexists(old):
        remove_tree(old)


def _move_inside(staging: str, target: str) -> None:
    """The target cannot be renamed, so its entries are exchanged one by one, and all back if one fails."""
    info = os.stat(staging)
    old = f"{staging}-old"
    os.mkdir(old, 0o700)
    moved: list[tuple[str, str]] = []

    def move(name: str, source: str, to: str) -> None:
        _rename_even_if_read_only(os.path.join(source, name), os.path.join(to, name))
        moved.append((os.path.join(source, name), os.path.join(to, name)))

    try:
        for name in set(os.listdir(target)) - {os.path.basename(staging), os.path.basename(old)}:
            move(name, target, old)
        for name in os.listdir(staging):
            move(name, staging, target)
    except BaseException:
        for source, to in reversed(moved):
            _rename_even_if_read_only(to, source)
        os.rmdir(old)
        raise
    os.rmdir(staging)
    remove_tree(old)
    os.chmod(target, stat.S_IMODE(info.st_mode))
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def _rename_even_if_read_only(source: str, target: str) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
        mode = stat.S_IMODE(os.stat(source).st_mode)  # a folder's own ".." changes: it must be writable
        os.chmod(source, mode | stat.S_IWUSR)
        os.rename(source, target)
        os.chmod(target, mode)
