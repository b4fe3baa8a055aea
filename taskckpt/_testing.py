"""The switches behind ``taskckpt.testing``. Nothing here is set outside tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taskckpt._stores import Store


@dataclass
class Switches:
    """Waiting between tries takes no time; every store that is opened is wrapped."""

    instant_retries: bool = False
    wrap_store: Callable[[Store], Store] | None = None


switches = Switches()
