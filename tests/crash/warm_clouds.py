"""Imports what clients of Google Cloud Storage and Azure need, once, for the children that are forked."""

from __future__ import annotations

import adlfs  # noqa: F401
import aiohttp  # noqa: F401
import azure.storage.blob.aio  # noqa: F401
import fsspec.asyn  # noqa: F401
import gcsfs  # noqa: F401

import taskckpt._stores.azure
import taskckpt._stores.gcs  # noqa: F401
