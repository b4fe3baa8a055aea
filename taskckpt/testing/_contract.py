"""What every store must do, as tests that the author of one runs by subclassing ``StoreContract``."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from taskckpt._layout import DATA, LOG, payload_key, slot_key
from taskckpt._operation import Stop, Stopped
from taskckpt._stores import CHUNK_BYTES
from taskckpt.errors import AlreadyExistsError, NotFoundError, TaskckptError

if TYPE_CHECKING:
    from taskckpt._stores import Store

# Opens the store at a path below one empty root; "" is the root itself. Each call opens it anew.
OpenAt: TypeAlias = "Callable[[str], Store]"

RACERS = 8
NONCE = "0123456789abcdef"


class StoreContract:
    """The tests of a store: subclass it, and give it one pytest fixture.

        class TestMyStore(StoreContract):
            @pytest.fixture
            def open_at(self, tmp_path):
                return lambda path: MyStore(f"{tmp_path}/{path}")

    ``open_at(path)`` opens the store anew at a path below a root that is the test's own and empty;
    ``open_at("")`` is that root.

    Attributes:
        across_processes: Other processes see the same objects; else the tests that fork are left out.
        part_bytes: What ``write`` sends in one piece; payloads around it, and several of it, are tried.
        atomic_writes: Nobody sees an object before its ``write`` ends. Good to have, and not needed: no
            commit names it before.
        many: So many objects are listed and deleted at once: more than the store puts on one page.
    """

    across_processes: bool = True
    part_bytes: int = CHUNK_BYTES
    atomic_writes: bool = True
    many: int = 1001

    def leftovers(self, store: Store) -> Sequence[str]:  # noqa: ARG002
        """What half-written objects there are that no listing shows. Override it where there may be any."""
        return ()

    def _settled_leftovers(self, store: Store) -> Sequence[str]:
        """The same, once the server is through with what was under way when its writers were killed."""
        before, now = None, self.leftovers(store)
        while now != before:
            time.sleep(0.3)
            before, now = now, self.leftovers(store)
        return now

    # --- list_below ----------------------------------------------------------------------------

    def test_an_absent_folder_is_an_empty_one(self, open_at: OpenAt) -> None:
        """Nothing there is no error."""
        store = open_at("")
        for folder in ("", LOG, DATA, f"{DATA}/deeper/still"):
            for first_page in (False, True):
                listing = store.list_below(folder, first_page=first_page)
                assert not listing.names
                assert listing.complete

    def test_a_listing_has_all_below_a_folder_and_nothing_beside_it(self, open_at: OpenAt) -> None:
        """Recursive, names relative to the folder."""
        store = open_at("")
        _create(store, slot_key(1), b"a record")
        _write(store, "data/a/one", b"1")
        _write(store, "data/a/deeper/two", b"22")
        _write(store, "data/zero", b"")
        _write(store, "data-of-others/three", b"333")
        assert sorted(store.list_below(DATA).names) == ["a/deeper/two", "a/one", "zero"]
        assert sorted(store.list_below("data/a").names) == ["deeper/two", "one"]
        assert list(store.list_below(LOG).names) == [slot_key(1).removeprefix(f"{LOG}/")]
        assert len(store.list_below("").names) == 5

    def test_a_listing_is_never_stale(self, open_at: OpenAt) -> None:
        """Neither what another connection has written nor what it has deleted is missed."""
        one, other = open_at(""), open_at("")
        for number in range(3):
            key = slot_key(number + 1)
            assert one.size(key) is None
            _create(other, key, b"new")
            assert len(one.list_below(LOG).names) == 1
            assert one.size(key) == 3
            other.delete([key])
            assert len(one.list_below(LOG).names) == 0
            assert one.size(key) is None

    def test_many_objects_are_listed_and_deleted(self, open_at: OpenAt) -> None:
        """More than a page, of folders too. The first page, if it is less than all, has the names that come first."""
        store = open_at("")
        keys = [f"{LOG}/{number:06d}/x" for number in range(self.many)]
        with ThreadPoolExecutor(RACERS) as pool:
            list(pool.map(lambda key: _create(store, key, b"x"), keys))
        names = [key.removeprefix(f"{LOG}/") for key in keys]
        everything = store.list_below(LOG)
        assert everything.complete
        assert sorted(everything.names) == names
        assert store.folders(LOG) == [name.partition("/")[0] for name in names]
        page = store.list_below(LOG, first_page=True)
        assert sorted(page.names) == names[: len(page.names)]
        assert page.complete == (len(page.names) == len(names))
        assert page.names
        store.delete([*keys[1:], f"{LOG}/absent"])
        assert list(store.list_below(LOG).names) == names[:1]

    # --- sizes_below, folders ------------------------------------------------------------------

    def test_the_sizes_of_all_below_a_folder(self, open_at: OpenAt) -> None:
        """The same names as a listing, and of each its bytes."""
        store = open_at("")
        for folder in ("", DATA):
            assert store.sizes_below(folder) == {}
        _create(store, slot_key(1), b"a record")
        _write(store, "data/a/one", b"1")
        _write(store, "data/a/deeper/empty", b"")
        _write(store, "data-of-others/three", b"333")
        assert store.sizes_below(DATA) == {"a/one": 1, "a/deeper/empty": 0}
        assert sorted(store.sizes_below("").values()) == [0, 1, 3, 8]
        store.delete(["data/a/one"])
        assert open_at("").sizes_below(DATA) == {"a/deeper/empty": 0}

    def test_the_folders_right_below_a_folder(self, open_at: OpenAt) -> None:
        """By their own names, sorted; no objects, none of another folder, none that is below another one."""
        store = open_at("")
        for folder in ("", "run", "run/b/deeper/still"):
            assert open_at(folder).folders("") == []
            assert store.folders(folder) == []
        for key in ("run/b/log/1", "run/b/log/2", "run/b/data/x/y", "run/a/log/1", "run/object", "run-2/c/log/1"):
            _write(store, key, b"1")
        assert store.folders("") == ["run", "run-2"]
        assert store.folders("run") == open_at("run").folders("") == ["a", "b"]
        assert store.folders("run/b") == ["data", "log"]
        assert store.folders("run/b/log") == []
        assert store.folders("ru") == []

    def test_folders_are_never_stale(self, open_at: OpenAt) -> None:
        """What another connection has written is seen."""
        one, other = open_at(""), open_at("")
        for name in ("a", "b", "c"):
            assert name not in one.folders("run")
            _create(other, f"run/{name}/log/1", b"new")
            assert one.folders("run")[-1] == name

    # --- read, size ----------------------------------------------------------------------------

    def test_what_was_created_is_read(self, open_at: OpenAt) -> None:
        """Any bytes, from any connection; a name says nothing about content."""
        data = bytes(range(256)) * 5
        _create(open_at(""), slot_key(7), data)
        assert open_at("").read(slot_key(7)) == data
        assert open_at(LOG).read(slot_key(7).removeprefix(f"{LOG}/")) == data
        _write(open_at(""), "data/empty", b"")
        assert open_at("").read("data/empty") == b""

    def test_an_absent_object_is_not_found(self, open_at: OpenAt) -> None:
        """``read`` and ``stream`` say so, with the key in the URI; ``size`` gives None."""
        store = open_at("")
        _write(store, "data/a/one", b"1")
        for key in (slot_key(1), "data/a/two", "data/b/one"):
            assert store.size(key) is None
            error = _raises(NotFoundError, lambda key=key: store.read(key))  # type: ignore[misc]
            assert error.uri is not None
            assert error.uri.endswith(key)
            _raises(NotFoundError, lambda key=key: list(store.stream(key, 10, Stop())))  # type: ignore[misc]

    def test_the_size_of_objects_folders_and_the_root(self, open_at: OpenAt) -> None:
        """Only an object has a size, and the root may be one."""
        store = open_at("")
        assert store.size("") is None
        _write(store, "data/a/one", b"12345")
        _write(store, "data/a/empty", b"")
        assert store.size("data/a/one") == 5
        assert store.size("data/a/empty") == 0
        assert store.size("data/a") is None
        assert store.size("") is None
        assert open_at("data/a/one").size("") == 5
        assert open_at("data/a/empty").size("") == 0
        assert _joined(open_at("data/a/one").stream("", 5, Stop())) == b"12345"

    # --- stream --------------------------------------------------------------------------------

    def test_a_stream_gives_every_byte_once_and_in_order(self, open_at: OpenAt) -> None:
        """Around the borders of chunks, and of several of them."""
        store = open_at("")
        for size in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES + 7):
            data, key = _pattern(size), f"data/a/{size}"
            _write(store, key, data)
            assert _joined(store.stream(key, size, Stop())) == data

    def test_an_object_of_another_size_than_promised(self, open_at: OpenAt) -> None:
        """A shorter one ends early or is an error of ours; of a longer one, the promised part is right."""
        store = open_at("")
        for size, promised in ((5, 9), (5, 2 * CHUNK_BYTES + 9), (CHUNK_BYTES, CHUNK_BYTES + 1), (0, 9)):
            data, key = _pattern(size), f"data/short/{size}-{promised}"
            _write(store, key, data)
            assert _joined(store.stream(key, promised, Stop())) == data
        data = _pattern(CHUNK_BYTES + 99)
        _write(store, "data/long", data)
        for promised in (1, CHUNK_BYTES, CHUNK_BYTES + 1):
            assert _joined(store.stream("data/long", promised, Stop()))[:promised] == data[:promised]

    def test_a_stream_stops_when_told_to(self, open_at: OpenAt) -> None:
        """At the next chunk, not at the end."""
        store, stop = open_at(""), Stop()
        _write(store, "data/long", _pattern(CHUNK_BYTES + 1))
        stop.set()
        _raises(Stopped, lambda: list(store.stream("data/long", CHUNK_BYTES + 1, stop)))

    # --- create --------------------------------------------------------------------------------

    def test_a_taken_key_is_refused_and_keeps_its_content(self, open_at: OpenAt) -> None:
        """Whoever was first, on whichever connection."""
        store = open_at("")
        _create(store, slot_key(1), b"first")
        for loser in (store, open_at("")):
            _raises(AlreadyExistsError, lambda loser=loser: _create(loser, slot_key(1), b"second, longer"))  # type: ignore[misc]
            assert open_at("").read(slot_key(1)) == b"first"
        assert list(store.list_below("").names) == [slot_key(1)]
        assert not self.leftovers(store)

    def test_a_deleted_key_can_be_created_again(self, open_at: OpenAt) -> None:
        """A refusal is about what is there now."""
        store = open_at("")
        _create(store, slot_key(1), b"first")
        store.delete([slot_key(1)])
        _create(store, slot_key(1), b"second")
        assert store.read(slot_key(1)) == b"second"

    def test_nothing_is_created_after_a_stop(self, open_at: OpenAt) -> None:
        """A caller that gave up finds no trace."""
        store, stop = open_at(""), Stop()
        stop.set()
        _raises(Stopped, lambda: store.create(slot_key(1), b"never", stop))
        assert not store.list_below("").names

    def test_of_threads_that_create_the_same_key_one_wins(self, open_at: OpenAt) -> None:
        """Some share a connection, some have their own."""
        shared = open_at("")
        for slot in range(1, 6):
            stores = [shared if number % 2 else open_at("") for number in range(RACERS)]
            barrier = threading.Barrier(RACERS)

            def race(number: int, slot: int = slot, stores: list[Store] = stores) -> bool:
                barrier.wait()  # noqa: B023 - the race is over before the next barrier is made
                return _wins(stores[number], slot_key(slot), number)

            with ThreadPoolExecutor(RACERS) as pool:
                won = list(pool.map(race, range(RACERS)))
            assert won.count(True) == 1, won
            assert shared.read(slot_key(slot)) == _content(won.index(True))

    def test_of_processes_that_create_the_same_key_one_wins(self, open_at: OpenAt) -> None:
        """As attempts on several machines do."""
        if not self.across_processes:
            return
        slots = range(1, 6)
        context = multiprocessing.get_context("fork")
        barrier, answers = context.Barrier(RACERS), context.SimpleQueue()

        def race(number: int) -> None:
            store = open_at("")
            store.list_below(LOG)  # connected before the race begins
            for slot in slots:
                barrier.wait(15)
                if _wins(store, slot_key(slot), number):
                    answers.put((slot, number))

        with _children(race, range(RACERS)) as codes:
            pass
        assert codes == [0] * RACERS
        winners = []
        while not answers.empty():
            winners.append(answers.get())
        assert sorted(slot for slot, _ in winners) == list(slots)
        for slot, number in winners:
            assert open_at("").read(slot_key(slot)) == _content(number)

    # --- write ---------------------------------------------------------------------------------

    def test_a_stream_is_written_whole(self, open_at: OpenAt) -> None:
        """Nothing, a byte, one part, several; in chunks of any size; whatever the hint says."""
        store, part = open_at(""), self.part_bytes
        sizes = (0, 1, part - 1, part, part + 1, 3 * part + 1)
        for size, (chunk, hint) in itertools.product(sizes, ((part // 2 + 1, size_of), (1 << 30, nothing))):
            data, key = _pattern(size), f"data/a/{size}-{chunk}"
            store.write(key, _chunks(data, chunk), hint(size), Stop())
            assert store.size(key) == size
            assert _joined(store.stream(key, size, Stop())) == data
        assert not self.leftovers(store)

    def test_nothing_is_left_of_a_write_whose_source_raises(self, open_at: OpenAt) -> None:
        """After no byte, a few, or several parts; whatever it raises, which is what the caller gets."""
        store = open_at("")
        for number, (before, error) in enumerate(
            itertools.product(
                (0, 10, self.part_bytes, 2 * self.part_bytes + 10),
                (_SourceError, KeyboardInterrupt, TaskckptError),
            )
        ):
            raised = _raises(
                error,
                lambda before=before, error=error, number=number: store.write(  # type: ignore[misc]
                    f"data/a/{number}", _broken(before, error), before, Stop()
                ),
            )
            assert str(raised) == "the source broke"
        assert not store.list_below("").names
        assert not self.leftovers(store)

    def test_nothing_is_left_of_a_write_that_is_stopped(self, open_at: OpenAt) -> None:
        """In the middle of the stream, or at its very end."""
        store, part = open_at(""), self.part_bytes
        for after, more in itertools.product((0, part // 2, part, 2 * part + 1), (True, False)):
            stop, key = Stop(), f"data/a/{after}-{more}"

            def write(stop: Stop = stop, key: str = key, after: int = after, more: bool = more) -> None:
                store.write(key, _stopping(stop, after, part, more=more), after, stop)

            _raises(Stopped, write)
        assert not store.list_below("").names
        assert not self.leftovers(store)

    def test_nothing_is_seen_of_a_write_before_it_ends(self, open_at: OpenAt) -> None:
        """A reader finds all of an object, or none of it."""
        if not self.atomic_writes:
            return
        store, reader = open_at(""), open_at("")
        seen: list[object] = []

        def source() -> Iterator[bytes]:
            for _ in range(3):
                yield _pattern(self.part_bytes)
                seen.extend((reader.size("data/a/one"), list(reader.list_below(DATA).names)))

        store.write("data/a/one", source(), 3 * self.part_bytes, Stop())
        assert seen == [None, []] * 3
        assert reader.size("data/a/one") == 3 * self.part_bytes

    def test_several_threads_write_at_once(self, open_at: OpenAt) -> None:
        """One connection is enough for all of them."""
        store, size = open_at(""), self.part_bytes // 8
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda number: _write(store, f"data/{number}", _content(number) * size), range(4)))
        for number in range(4):
            whole = size * len(_content(number))
            assert _joined(store.stream(f"data/{number}", whole, Stop())) == _content(number) * size

    # --- delete, sweep -------------------------------------------------------------------------

    def test_absent_objects_do_not_matter_to_delete(self, open_at: OpenAt) -> None:
        """None at all, one that never was, one that is gone, and a folder that never was."""
        store = open_at("")
        store.delete([])
        store.delete([slot_key(1)])
        store.delete(["data/a/one", "data/b/two", slot_key(2)])
        _write(store, "data/a/one", b"1")
        _write(store, "data/a/two", b"2")
        store.delete(["data/a/one", "data/a/absent"])
        store.delete(["data/a/one"])
        assert list(store.list_below("").names) == ["data/a/two"]
        _write(store, "data/a/one", b"again")
        assert store.read("data/a/one") == b"again"

    def test_a_sweep_takes_what_killed_writers_left_and_nothing_else(self, open_at: OpenAt) -> None:
        """Complete objects stay, also dead ones; so does what a living writer has half-written."""
        store = open_at("")
        dead, living = payload_key(1, NONCE, 1, NONCE), payload_key(9, NONCE, 1, NONCE)
        whole = payload_key(1, NONCE, 2, NONCE)
        store.sweep(lambda _: True)  # nothing there at all
        _write(store, whole, b"whole")
        _create(store, slot_key(1), b"record")
        if self.across_processes:
            with _children(lambda key: _killed_while_writing(open_at(""), key, self.part_bytes), (dead, living)):
                pass
        before = set(store.list_below("").names)
        assert before >= {whole, slot_key(1)}
        half_written = len(self._settled_leftovers(store))
        asked: list[str] = []

        def is_dead(key: str) -> bool:
            asked.append(key)
            return key == dead

        store.sweep(is_dead)
        assert set(store.list_below("").names) >= {whole, slot_key(1)}
        assert set(asked) <= {dead, living}, "sweep asks about half-written keys only"
        if half_written:
            assert sorted(asked) == [dead, living]
            assert len(self.leftovers(store)) < half_written
            store.sweep(lambda _: True)
        assert not self.leftovers(store)


class _SourceError(Exception):
    """What a source raises in these tests."""


def size_of(size: int) -> int:
    """A hint that is right."""
    return size


def nothing(size: int) -> int:  # noqa: ARG001
    """A hint that says nothing."""
    return 0


def _pattern(size: int) -> bytes:
    """Bytes among which no two chunks look the same."""
    block = b"".join(number.to_bytes(4, "big") for number in range(4099))
    return (block * (size // len(block) + 1))[:size]


def _chunks(data: bytes, size: int) -> Iterator[memoryview]:
    """Pieces of ``size`` bytes, each in the same buffer: whoever keeps one longer than it is valid notices."""
    buffer = memoryview(bytearray(min(size, len(data))))
    for start in range(0, len(data), size):
        piece = data[start : start + size]
        buffer[: len(piece)] = piece
        yield buffer[: len(piece)]
        buffer[:] = bytes(len(buffer))


def _joined(chunks: Iterable[bytes | memoryview]) -> bytes:
    """Copied one by one: a chunk is valid until the next is asked for."""
    return b"".join(map(bytes, chunks))


def _broken(size: int, error: type[BaseException]) -> Iterator[bytes]:
    yield _pattern(size)
    raise error("the source broke")


def _stopping(stop: Stop, size: int, chunk: int, *, more: bool) -> Iterator[bytes | memoryview]:
    yield from _chunks(_pattern(size), chunk)
    stop.set()
    if more:
        yield b"never written"


def _create(store: Store, key: str, data: bytes) -> None:
    store.create(key, data, Stop())


def _write(store: Store, key: str, data: bytes) -> None:
    store.write(key, iter((data,)), len(data), Stop())


def _content(number: int) -> bytes:
    return b"written by %d" % number


def _wins(store: Store, key: str, number: int) -> bool:
    try:
        _create(store, key, _content(number))
    except AlreadyExistsError:
        return False
    return True


def _raises(kind: type[BaseException], call: Callable[[], object]) -> TaskckptError:
    """What ``call`` raises, which must be of that kind and nothing less."""
    try:
        call()
    except kind as error:
        return error  # type: ignore[return-value]
    raise AssertionError(f"it did not raise {kind.__name__}")


def _killed_while_writing(store: Store, key: str, part_bytes: int) -> None:
    def source() -> Iterator[bytes]:
        for _ in range(6):  # more than what is under way at once, so that something is
            yield _pattern(part_bytes)
        os.kill(os.getpid(), signal.SIGKILL)

    store.write(key, source(), 6 * part_bytes, Stop())


@contextmanager
def _children(work: Callable[..., object], arguments: Sequence[object] | range) -> Generator[list[int | None]]:
    """Forked processes, each with an argument of its own; their exit codes once the block has ended."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(argument,)) for argument in arguments]
    codes: list[int | None] = []
    for process in processes:
        process.start()
    try:
        yield codes
    finally:
        for process in processes:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()
        codes += [process.exitcode for process in processes]
