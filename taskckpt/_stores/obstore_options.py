"""What fsspec's storage options, the environment and the files of a cloud mean to obstore.

One function per cloud gives ``Settings``. What obstore cannot honour is never dropped: ``unhonoured`` names it, and
the store goes through fsspec.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

from taskckpt._stores import Location
from taskckpt.errors import DeniedError, UsageError

# How long credentials that expire are kept here. botocore renews them 10 minutes before their end.
CREDENTIALS_KEPT = timedelta(minutes=10)

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Settings:
    """How obstore's client for one bucket is made.

    Attributes:
        store: The name of the class in ``obstore.store``.
        bucket: Its first argument.
        config: What that class takes as ``config``.
        client: Of ``client_options``: what the user said about certificates and time-outs.
        credentials: Gives the current credentials each time it is called; None: obstore looks for them itself.
        url: Where the bucket answers.
        unhonoured: What was asked for, and obstore does not know, by name. The rest is not filled in then.
    """

    store: str
    bucket: str
    config: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    credentials: Callable[[], Any] | None = None
    url: str = ""
    unhonoured: Sequence[str] = ()


# --- s3:// -------------------------------------------------------------------------------------

# Without a meaning here: they are about s3fs's own files, caches and threads.
_S3FS_ONLY = {
    *("asynchronous", "cache_regions", "default_block_size", "default_cache_type", "default_fill_cache"),
    *("fixed_upload_size", "listings_expiry_time", "local_expiry_check", "loop", "max_concurrency", "max_paths"),
    *("skip_instance_cache", "use_listings_cache"),
}
_S3_OPTIONS = {
    *("anon", "key", "username", "secret", "password", "token", "endpoint_url", "use_ssl", "profile"),
    *("requester_pays", "client_kwargs", "config_kwargs"),
}
_CLIENT_KWARGS = {
    *("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "endpoint_url", "region_name", "use_ssl"),
    "verify",
}
_CONFIG_KWARGS = {"connect_timeout", "read_timeout", "max_pool_connections", "region_name", "retries", "s3"}
_S3_CONFIG = {"addressing_style", "payload_signing_enabled"}
# Switches of the environment and of the files that change the address.
_UNKNOWN_VARIABLES = ("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT")
_UNKNOWN_IN_FILES = ("use_fips_endpoint", "use_dualstack_endpoint")
_UNKNOWN_IN_S3_OF_FILES = ("use_accelerate_endpoint", "use_dualstack_endpoint")
_URL = re.compile(r"https?://[A-Za-z0-9._:\[\]-]+(/[!-~]*)?")
# Names that need another address or another way to sign: access points, S3 Express.
_PLAIN_BUCKET = re.compile(r"[a-zA-Z0-9._-]{3,255}(?<!--x-s3)")


def _s3_unhonoured(location: Location, options: Mapping[str, Any]) -> list[str]:
    client, config = options.get("client_kwargs") or {}, options.get("config_kwargs") or {}
    found = [name for name, value in options.items() if value and name not in _S3_OPTIONS | _S3FS_ONLY]
    found += [f"client_kwargs[{name!r}]" for name in client if name not in _CLIENT_KWARGS]
    found += [f"config_kwargs[{name!r}]" for name in config if name not in _CONFIG_KWARGS]
    found += [f"config_kwargs['s3'][{name!r}]" for name in (config.get("s3") or {}) if name not in _S3_CONFIG]
    found += [name for name in _UNKNOWN_VARIABLES if os.environ.get(name, "false").lower() != "false"]
    if not _PLAIN_BUCKET.fullmatch(location.path.partition("/")[0]):
        found.append("the bucket's name")
    return found


@dataclass(slots=True)
class _Known:
    """What is settled of an S3 client, from the strongest source to the weakest."""

    region: str | None
    endpoint: str | None
    style: str | None
    verify: bool | str | None
    credentials: Callable[[], Any] | None
    unhonoured: Sequence[str] = ()


def s3_settings(location: Location, options: Mapping[str, Any], region: str | None = None) -> Settings:
    """Settings for an S3 bucket, found where s3fs finds them. ``region`` overrules all.

    Raises:
        DeniedError: There are no credentials.
    """
    client, config = options.get("client_kwargs") or {}, options.get("config_kwargs") or {}
    s3 = config.get("s3") or {}
    bucket = location.path.partition("/")[0]
    unhonoured = _s3_unhonoured(location, options)
    if unhonoured:
        return Settings("S3Store", bucket, unhonoured=unhonoured)
    anon = bool(options.get("anon"))
    known = _Known(
        region=client.get("region_name") or config.get("region_name"),
        endpoint=client.get("endpoint_url") or options.get("endpoint_url"),
        style=s3.get("addressing_style"),
        verify=client.get("verify", os.environ.get("AWS_CA_BUNDLE")),
        credentials=None if anon else _given_keys(options, client),
    )
    _look_around(known, options.get("profile"), location.uri, anon=anon)
    if known.unhonoured:
        return Settings("S3Store", bucket, unhonoured=known.unhonoured)
    known.region = region or known.region or "us-east-1"
    secure = bool(client.get("use_ssl", options.get("use_ssl", True)))
    url, virtual = _s3_address(bucket, known.region, known.endpoint, known.style, secure=secure)
    if _URL.fullmatch(url) is None:  # obstore would panic
        raise UsageError(
            f"This is no address of a store: {url!r}.",
            uri=location.uri,
            hint="Check endpoint_url and region_name in storage_options; an endpoint begins with https:// or http://.",
        )
    chosen: dict[str, Any] = {
        "region": known.region,
        "endpoint": url if virtual else url.removesuffix(f"/{bucket}"),
        "virtual_hosted_style_request": virtual,
        "skip_signature": anon,
        "request_payer": bool(options.get("requester_pays")),
        "unsigned_payload": url.startswith("https:") and not s3.get("payload_signing_enabled"),
    }
    trust = _trust(known.verify, location.uri) if url.startswith("https:") else {}
    given = {name: config[name] for name in ("connect_timeout", "read_timeout") if config.get(name)}
    return Settings("S3Store", bucket, chosen, {**trust, **given}, known.credentials, url)


def _given_keys(options: Mapping[str, Any], client: Mapping[str, Any]) -> Callable[[], Any] | None:
    key = client.get("aws_access_key_id") or options.get("key") or options.get("username")
    secret = client.get("aws_secret_access_key") or options.get("secret") or options.get("password")
    token = client.get("aws_session_token") or options.get("token")
    return _constant(key, secret, token) if key and secret else None


def _constant(key: str, secret: str, token: str | None) -> Callable[[], Any]:
    return lambda: {"access_key_id": key, "secret_access_key": secret, "token": token or None, "expires_at": None}


def _look_around(known: _Known, profile: str | None, uri: str, *, anon: bool) -> None:
    """Fills in what the options do not say: from the variables, and if need be through botocore from all else."""
    env = os.environ
    if profile is None and not env.get("AWS_PROFILE") and not env.get("AWS_DEFAULT_PROFILE"):
        key, secret = env.get("AWS_ACCESS_KEY_ID"), env.get("AWS_SECRET_ACCESS_KEY")
        if known.credentials is None and not anon and key and secret:
            known.credentials = _constant(key, secret, env.get("AWS_SESSION_TOKEN"))
        if (known.credentials is not None or anon) and (_is_complete(known) or not _has_content(_config_file())):
            # Nothing is left that a file could say, so botocore, which takes 0.3 s to import, is not asked.
            known.region = known.region or env.get("AWS_DEFAULT_REGION")
            if env.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "false").lower() != "true":
                known.endpoint = known.endpoint or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
            return
    _ask_botocore(known, profile, uri, anon=anon)


def _is_complete(known: _Known) -> bool:
    return bool(known.region and known.endpoint)


def _config_file() -> str:
    return os.path.expanduser(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config")


def _has_content(path: str) -> bool:
    try:
        return os.path.getsize(path) > 0
    except OSError:
        return False


def _ask_botocore(known: _Known, profile: str | None, uri: str, *, anon: bool) -> None:
    try:
        import botocore.configprovider
        import botocore.session
    except ImportError:
        return  # obstore looks itself: variables, web identity, container and instance, but no files
    session = botocore.session.Session(profile=profile)
    scoped = session.get_scoped_config()
    known.region = known.region or session.get_config_variable("region")
    if not known.endpoint and not session.get_config_variable("ignore_configured_endpoint_urls"):
        provider = botocore.configprovider.ConfiguredEndpointProvider(
            full_config=session.full_config, scoped_config=scoped, client_name="s3"
        )
        known.endpoint = provider.provide()
    s3: Any = scoped.get("s3") if isinstance(scoped.get("s3"), dict) else {}
    known.style = known.style or s3.get("addressing_style")
    known.verify = scoped.get("ca_bundle") if known.verify is None else known.verify
    known.unhonoured = [
        *(name for name in _UNKNOWN_IN_FILES if scoped.get(name)),
        *(f"s3.{name}" for name in _UNKNOWN_IN_S3_OF_FILES if s3.get(name)),
    ]
    if known.unhonoured or known.credentials is not None or anon:
        return
    found = session.get_credentials()
    if found is None:
        raise DeniedError(
            "There are no credentials for s3://.",
            uri=uri,
            hint="Pass key and secret in storage_options, or set the usual variables, files or roles of AWS.",
        )
    known.credentials = _renewed(found)
    known.credentials()  # what is wrong with them is said now


def _renewed(found: Any) -> Callable[[], Any]:
    def credentials() -> Any:
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_KEPT,
        }

    return credentials


def _trust(verify: bool | str | None, uri: str) -> dict[str, Any]:
    """Whose certificates are believed. Those in a file come on top of the system's: obstore knows no other way."""
    if verify is False:
        return {"allow_invalid_certificates": True}
    if not isinstance(verify, str):
        return {}
    try:
        with open(verify, "rb") as file:
            return {"root_certificate": file.read()}
    except OSError as error:
        raise UsageError(
            f"The certificates cannot be read: {error}.", uri=uri, hint="See verify and AWS_CA_BUNDLE."
        ) from error


def _s3_address(bucket: str, region: str, endpoint: str | None, style: str | None, *, secure: bool) -> tuple[str, bool]:
    """Where the bucket answers, and whether its name is part of the host's; as botocore decides it."""
    if endpoint:
        url = urlsplit(endpoint)
        virtual = style == "virtual"
    else:
        dns = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        url = urlsplit(f"{'https' if secure else 'http'}://s3.{region}.{dns}")
        # A certificate for *.s3.amazonaws.com covers no name with a dot in it.
        virtual = style != "path" and re.fullmatch(r"[a-z0-9-]{3,63}", bucket) is not None
    host = f"{bucket}.{url.netloc}" if virtual else url.netloc
    path = url.path.rstrip("/")
    return f"{url.scheme}://{host}{path}" + ("" if virtual else f"/{bucket}"), virtual
