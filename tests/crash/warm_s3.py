"""Imports what a client of S3 needs and reads botocore's large models once, for the children that are forked.

A session makes no client, no thread and no loop before the fork; it only shares what it has read from disk.
"""

from __future__ import annotations

import asyncio

import aiobotocore.session
import botocore.session
import s3fs  # noqa: F401

import taskckpt._stores.s3  # noqa: F401


def _share_models() -> None:
    session = aiobotocore.session.get_session()
    loader = session.get_component("data_loader")

    async def read() -> None:
        async with session.create_client("s3", region_name="us-east-1"):
            pass

    asyncio.run(read())
    botocore.session.create_loader = lambda *_: loader


_share_models()
