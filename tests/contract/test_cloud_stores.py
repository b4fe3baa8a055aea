"""The contract of a store over Google Cloud Storage and Azure Blob Storage, as far as their emulators go."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from taskckpt._layout import payload_key
from taskckpt._stores import azure as _azure
from taskckpt._stores import gcs as _gcs
from taskckpt._stores import obstore as _obstore
from taskckpt.testing import StoreContract


class TestGCS(StoreContract):
    part_bytes = _gcs.PART_BYTES
    many = 101

    @pytest.fixture
    def open_at(self, fake_gcs_place, monkeypatch):
        monkeypatch.setattr(_gcs, "PAGE", 40)
        return fake_gcs_place.open


class TestAzure(StoreContract):
    part_bytes = _azure.BLOCK_BYTES
    many = 101

    @pytest.fixture
    def open_at(self, azurite_place, monkeypatch):
        monkeypatch.setattr(_azure, "PAGE", 40)
        self.place = azurite_place
        return azurite_place.open

    def leftovers(self, store):
        place = self.place
        bucket, _, prefix = place.url.removeprefix("az://").partition("/")
        everything = place.server.keys(bucket, f"{prefix}/", uncommitted=True)
        return sorted(set(everything) - set(place.server.keys(bucket, f"{prefix}/")))


class TestAzureThroughObstore(TestAzure):
    part_bytes = _obstore.PART_BYTES

    @pytest.fixture
    def open_at(self, azurite_obstore_place, monkeypatch):
        monkeypatch.setattr(_obstore, "PAGE_KEYS", 40)
        self.place = azurite_obstore_place
        return azurite_obstore_place.open


class TestGoogleThroughObstore(StoreContract):
    """Over Google's XML interface; forked children would go through gcsfs, and thus over the other one."""

    part_bytes = _obstore.PART_BYTES
    across_processes = False
    many = 101

    @pytest.fixture
    def open_at(self, google_xml_obstore_place, monkeypatch):
        monkeypatch.setattr(_obstore, "PAGE_KEYS", 40)
        self.place = google_xml_obstore_place
        return google_xml_obstore_place.open

    def leftovers(self, store):
        return uploads(self.place)


def uploads(place):
    bucket, _, prefix = place.url.removeprefix("gs://").partition("/")
    status, answer = place.server.behind.request("GET", f"/{bucket}?uploads")
    assert status == 200, answer
    keys = [entry.findtext("{*}Key", "") for entry in ET.fromstring(answer).findall("{*}Upload")]
    return [key for key in keys if key.startswith(prefix)]


def test_gcsfs_sweeps_what_a_killed_obstore_left(google_xml_obstore_place):
    place = google_xml_obstore_place
    store, dead = place.open(), payload_key(1, "0123456789abcdef", 1, "0123456789abcdef")
    bucket, _, prefix = place.url.removeprefix("gs://").partition("/")
    for key in (dead, dead.replace("00000001-", "00000002-")):
        assert place.server.behind.request("POST", f"/{bucket}/{prefix}/{key}?uploads")[0] == 200
    asked = []

    def is_dead(key):
        asked.append(key)
        return key == dead

    store.sweep(is_dead)
    assert len(asked) == 2
    assert dead in asked
    assert uploads(place) == [f"{prefix}/{key}" for key in asked if key != dead]
    store.sweep(lambda _: True)
    assert not uploads(place)
