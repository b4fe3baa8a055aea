"""``python -m taskckpt``: the command line."""

from __future__ import annotations

if __name__ == "__main__":
    from taskckpt.cli import main

    main(prog_name="python -m taskckpt")
