"""What the log tells of a save and a load: a sentence for people, and the same as a dict for programs.

The dict is the attribute ``taskckpt`` of the log record, where formatters that write JSON find it: sizes in bytes,
times in seconds, rates in MiB of content per second.
"""

from __future__ import annotations

import logging
from typing import Any

from taskckpt._chain import Loadable, Origin
from taskckpt._foreign import ForeignObject
from taskckpt._log.records import Commit
from taskckpt._payload import kind_of

logger = logging.getLogger("taskckpt")


def tell_saved(commit: Commit, uri: str, *, prepare_s: float, upload_s: float, commit_s: float) -> None:
    """``prepare_s`` is for looking at the source and taking the task over; ``upload_s`` for packing and sending."""
    if not logger.isEnabledFor(logging.INFO):
        return
    total_s = prepare_s + upload_s + commit_s
    told = {
        "event": "saved",
        "uri": uri,
        "slot": commit.stamp.slot,
        "kind": commit.content.kind,
        "size_bytes": commit.content.digest.size_bytes,
        "stored_bytes": commit.stored.digest.size_bytes,
        "prepare_s": prepare_s,
        "upload_s": upload_s,
        "commit_s": commit_s,
        "total_s": total_s,
        "mib_per_s": _rate(commit.content.digest.size_bytes, total_s),
    }
    logger.info(
        "Saved %(kind)s to slot %(slot)d of %(uri)s: %(size_bytes)d bytes, stored as %(stored_bytes)d, "
        "in %(total_s).2f s (%(mib_per_s).0f MiB/s; prepare %(prepare_s).3f, upload %(upload_s).3f, "
        "commit %(commit_s).3f s).",
        told,
        extra={"taskckpt": told},
    )


def tell_loaded(where: Origin, found: Loadable, *, find_s: float, restore_s: float) -> None:
    """``find_s`` is for the log and taking the task over, ``restore_s`` for reading and unpacking."""
    if not logger.isEnabledFor(logging.INFO):
        return
    told: dict[str, Any] = {
        "event": "loaded",
        "uri": where.store.uri,
        "slot": None,
        "saved": None,
        "kind": kind_of(found),
    }
    if isinstance(found, ForeignObject):
        told["size_bytes"] = found.size_bytes
    else:
        told |= {
            "slot": found.stamp.slot,
            "saved": found.stamp.time,
            "size_bytes": found.content.digest.size_bytes,
        }
    told |= {"find_s": find_s, "restore_s": restore_s, "total_s": find_s + restore_s}
    told["mib_per_s"] = _rate(told["size_bytes"], told["total_s"])
    logger.info(
        "Resumed from %(uri)s (slot %(slot)s, %(kind)s, %(size_bytes)d bytes, saved %(saved)s) in %(total_s).2f s "
        "(%(mib_per_s).0f MiB/s; find %(find_s).3f, restore %(restore_s).3f s).",
        told,
        extra={"taskckpt": told},
    )


def _rate(size_bytes: int, seconds: float) -> float:
    return size_bytes / 2**20 / max(seconds, 1e-9)
