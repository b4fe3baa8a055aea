"""A store that can be watched, slowed down, broken or killed at every request."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

from taskckpt._testing import switches

if TYPE_CHECKING:
    from taskckpt._operation import Stop
    from taskckpt._stores import Listing, Store

T = TypeVar("T")

Verb: TypeAlias = Literal["list", "sizes", "folders", "read", "size", "stream", "create", "write", "delete", "sweep"]
When: TypeAlias = Literal["before", "after"]

# Called around every request, with the keys it is about. Raising before it is a request that never
# arrived, raising after it a reply that was lost, sleeping a slow store, ``os.kill`` a crash.
Hook: TypeAlias = Callable[[When, Verb, Sequence[str]], None]


class InterceptedStore:
    """Any store, with a hook around each of its requests."""

    def __init__(self, store: Store, hook: Hook) -> None:
        self._store = store
        self._hook = hook
        self.uri = store.uri
        self.exclusive = store.exclusive

    def _around(self, verb: Verb, keys: Sequence[str], request: Callable[[], T]) -> T:
        self._hook("before", verb, keys)
        result = request()
        self._hook("after", verb, keys)
        return result

    def list_below(self, folder: str, *, first_page: bool = False) -> Listing:
        return self._around("list", [folder], lambda: self._store.list_below(folder, first_page=first_page))

    def sizes_below(self, folder: str) -> dict[str, int]:
        return self._around("sizes", [folder], lambda: self._store.sizes_below(folder))

    def folders(self, folder: str) -> list[str]:
        return self._around("folders", [folder], lambda: self._store.folders(folder))

    def read(self, key: str) -> bytes:
        return self._around("read", [key], lambda: self._store.read(key))

    def size(self, key: str) -> int | None:
        return self._around("size", [key], lambda: self._store.size(key))

    def stream(self, key: str, size_bytes: int, stop: Stop) -> Iterator[bytes | memoryview]:
        self._hook("before", "stream", [key])
        yield from self._store.stream(key, size_bytes, stop)
        self._hook("after", "stream", [key])

    def create(self, key: str, data: bytes, stop: Stop) -> None:
        self._around("create", [key], lambda: self._store.create(key, data, stop))

    def write(self, key: str, chunks: Iterable[bytes | memoryview], size_hint: int, stop: Stop) -> None:
        self._around("write", [key], lambda: self._store.write(key, chunks, size_hint, stop))

    def delete(self, keys: Sequence[str]) -> None:
        self._around("delete", keys, lambda: self._store.delete(keys))

    def sweep(self, is_dead: Callable[[str], bool]) -> None:
        self._around("sweep", [], lambda: self._store.sweep(is_dead))


@contextmanager
def intercepted(hook: Hook) -> Generator[None]:
    """Every store that is opened inside calls ``hook(when, verb, keys)`` before and after each request.

    A hook that raises ``UnavailableError`` stands for a fault that outlasted the retries.

    >>> from taskckpt import Checkpoint
    >>> seen = []
    >>> with intercepted(lambda when, verb, keys: seen.append((when, verb))):
    ...     Checkpoint("memory://intercepted-example", read_only=True).load_sync()
    >>> seen
    [('before', 'list'), ('after', 'list')]
    """
    before = switches.wrap_store
    switches.wrap_store = lambda store: InterceptedStore(store, hook)
    try:
        yield
    finally:
        switches.wrap_store = before


@contextmanager
def instant_retries() -> Generator[None]:
    """Retries of tasks and of requests to stores happen at once inside, instead of after a back-off."""
    before = switches.instant_retries
    switches.instant_retries = True
    try:
        yield
    finally:
        switches.instant_retries = before
