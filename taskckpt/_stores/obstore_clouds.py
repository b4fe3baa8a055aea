"""What the storage options of gcsfs and adlfs, and their variables, mean to obstore; see ``_obstore_options``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from taskckpt._stores import Location
from taskckpt._stores.obstore_options import Settings
from taskckpt.errors import DeniedError, UsageError

# Without a meaning here: they are about fsspec's own files, caches and threads.
_FSSPEC_ONLY = {
    *("asynchronous", "batch_size", "default_cache_type", "default_fill_cache", "listings_expiry_time", "loop"),
    *("max_paths", "skip_instance_cache", "use_listings_cache"),
}

_Credentials = Callable[[], Any]


def _unknown(options: Mapping[str, Any], known: set[str]) -> list[str]:
    return [name for name, value in options.items() if value and name not in known | _FSSPEC_ONLY]


def _constant(**credentials: Any) -> _Credentials:
    return lambda: {**credentials, "expires_at": None}


# --- gs:// -------------------------------------------------------------------------------------

_GCS_OPTIONS = {
    *("access", "block_size", "cache_timeout", "check_connection", "consistency", "default_location", "endpoint_url"),
    *("project", "secure_serialize", "timeout", "token", "version_aware"),
}
_GCSFS_TOKENS = "~/.gcs_tokens"
# obstore reads without credentials, but asks the machine for some before it writes.
_ANONYMOUS = "anonymous access"


def gcs_settings(location: Location, options: Mapping[str, Any], region: str | None = None) -> Settings:  # noqa: ARG001
    """Settings for a bucket of Google Cloud Storage, with credentials found where gcsfs finds them.

    Raises:
        DeniedError: The credentials that are named are not there, or are none.
    """
    bucket = location.path.partition("/")[0]
    unhonoured = _gcs_unhonoured(options)
    if unhonoured:
        return Settings("GCSStore", bucket, unhonoured=unhonoured)
    universe = os.environ.get("GOOGLE_CLOUD_UNIVERSE_DOMAIN", "googleapis.com")
    base: str = (options.get("endpoint_url") or _gcs_emulator() or f"https://storage.{universe}").rstrip("/")
    # The base is always said: else a variable that gcsfs does not know could lead elsewhere.
    settings = Settings("GCSStore", bucket, {"base_url": base}, url=f"{base}/{bucket}")
    return _with_google_credentials(settings, options, location.uri)


def _gcs_unhonoured(options: Mapping[str, Any]) -> list[str]:
    token = options.get("token")
    found = _unknown(options, _GCS_OPTIONS)
    if token in ("cache", "browser") or (token is None and os.path.exists(os.path.expanduser(_GCSFS_TOKENS))):
        found.append(f"{_GCSFS_TOKENS} of gcsfs")
    if isinstance(token, dict) and "type" not in token:
        found.append("token without a type")
    if token == "anon":  # noqa: S105 - gcsfs's word
        found.append(_ANONYMOUS)
    if os.environ.get("GOOGLE_API_USE_CLIENT_CERTIFICATE", "").lower() == "true":
        found.append("GOOGLE_API_USE_CLIENT_CERTIFICATE")
    return found


def _gcs_emulator() -> str | None:
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if host in ("", "default"):
        return None
    return host if "://" in host else f"http://{host}"


def _with_google_credentials(settings: Settings, options: Mapping[str, Any], uri: str) -> Settings:
    token = options.get("token")
    is_file = isinstance(token, str) and os.path.exists(token)
    if isinstance(token, str) and token not in ("cloud", "google_default") and not is_file:
        return replace(settings, credentials=_constant(token=token))
    try:
        import google.auth
        import google.auth.exceptions
    except ImportError:
        # obstore looks itself: a variable, gcloud's file, the machine's account.
        named = {"application_credentials": token} if is_file else {}
        return replace(settings, config={**settings.config, **named})
    scope = f"https://www.googleapis.com/auth/devstorage.{options.get('access') or 'full_control'}"
    try:
        return replace(settings, credentials=_renewed(_google_found(token, [scope])))
    except (google.auth.exceptions.GoogleAuthError, OSError, ValueError) as error:
        if token is None:  # gcsfs goes on without
            return Settings(settings.store, settings.bucket, unhonoured=[_ANONYMOUS])
        raise DeniedError(f"The credentials cannot be used: {error}", uri=uri, hint="Check token.") from error


def _google_found(token: Any, scopes: list[str]) -> Any:
    import google.auth

    auth: Any = google.auth
    if token is None or token == "google_default":  # noqa: S105 - gcsfs's word
        return auth.default(scopes=scopes)[0]
    if token == "cloud":  # noqa: S105 - same
        from google.auth.compute_engine import Credentials

        make: Any = Credentials
        return make()
    if isinstance(token, str):
        with open(token, "rb") as file:
            token = json.load(file)
    if not isinstance(token, dict):
        return token  # a Credentials object
    if token.get("type") == "service_account":
        from google.oauth2 import service_account

        of_service: Any = service_account.Credentials
        return of_service.from_service_account_info(token, scopes=scopes)
    from google.oauth2.credentials import Credentials as Authorized

    of_user: Any = Authorized
    return of_user.from_authorized_user_info(token)


def _renewed(found: Any) -> _Credentials:
    def credentials() -> Any:
        from google.auth.transport.requests import Request

        if not found.valid:
            found.refresh(Request())
        return {"token": found.token, "expires_at": found.expiry and found.expiry.replace(tzinfo=UTC)}

    return credentials


# --- az:// -------------------------------------------------------------------------------------

_AZURE_OPTIONS = {
    *("account_host", "account_key", "account_name", "anon", "assume_container_exists", "blocksize", "client_id"),
    *("client_secret", "connection_string", "connection_timeout", "location_mode", "max_concurrency", "read_timeout"),
    *("sas_token", "tenant_id", "timeout", "version_aware"),
}
# A connection string beats all else, as in adlfs; then a key, a signature, a service principal.
_AZURE_NAMED = ("connection_string", "account_name", "account_key", "sas_token", "client_id", "client_secret")
_AZURE_TOKENS_FOR = "https://storage.azure.com/.default"


def azure_settings(location: Location, options: Mapping[str, Any], region: str | None = None) -> Settings:  # noqa: ARG001
    """Settings for a container of Azure Blob Storage, with credentials found where adlfs finds them.

    Raises:
        UsageError: Nothing names the account.
    """
    bucket, _, host = location.path.partition("/")[0].partition("@")
    unhonoured = _unknown(options, _AZURE_OPTIONS)
    unhonoured += ["location_mode"] if options.get("location_mode", "primary") != "primary" else []
    if unhonoured:
        return Settings("AzureStore", bucket, unhonoured=unhonoured)
    names = (*_AZURE_NAMED, "tenant_id")
    given = {name: options.get(name) or os.environ.get(f"AZURE_STORAGE_{name.upper()}") for name in names}
    given["account_name"] = options.get("account_name") or host.partition(".")[0] or given["account_name"]
    if given["connection_string"]:
        given, endpoint = _connection(given["connection_string"])
    else:
        endpoint = f"https://{options.get('account_host') or '{}.blob.core.windows.net'.format(given['account_name'])}"
    if not given["account_name"]:
        raise UsageError(
            "Nothing names the Azure account.",
            uri=location.uri,
            hint="Pass connection_string or account_name in storage_options, or set AZURE_STORAGE_ACCOUNT_NAME.",
        )
    config: dict[str, Any] = {"account_name": given["account_name"], "endpoint": endpoint}
    credentials = _azure_credentials(given, options.get("anon"), config)
    kept = {"connection_timeout": "connect_timeout", "read_timeout": "read_timeout"}
    client = {kept[name]: options[name] for name in kept if options.get(name)}
    return Settings("AzureStore", bucket, config, client, credentials, f"{endpoint}/{bucket}")


def _connection(text: str) -> tuple[dict[str, str | None], str]:
    """What a connection string says: who, and where."""
    parts = {name.lower(): value for name, _, value in (part.partition("=") for part in text.strip(";").split(";"))}
    account, endpoint = parts.get("accountname"), parts.get("blobendpoint", "").rstrip("/")
    if account and not endpoint:
        scheme, suffix = parts.get("defaultendpointsprotocol", "https"), parts.get("endpointsuffix", "core.windows.net")
        endpoint = f"{scheme}://{account}.blob.{suffix}"
    if endpoint and not account:  # a string with a signature need not name the account: its address does
        url = urlsplit(endpoint)
        account = url.path.strip("/") or (url.hostname or "").partition(".")[0]
    signature = parts.get("sharedaccesssignature")
    return {"account_name": account, "account_key": parts.get("accountkey"), "sas_token": signature}, endpoint


def _azure_credentials(given: Mapping[str, Any], anon: Any, config: dict[str, Any]) -> _Credentials | None:
    """Gives the current credentials; None where ``config`` says it: anonymous, or obstore looks itself."""
    if given.get("account_key"):
        return _constant(access_key=given["account_key"])
    if given.get("sas_token"):
        return _constant(sas_token=given["sas_token"].removeprefix("?"))
    if given.get("client_id") and given.get("client_secret") and given.get("tenant_id"):
        principal = {name: given[name] for name in ("client_id", "client_secret", "tenant_id")}
        config.update(principal, credential_type="client_secret")
        return None
    if anon is None:
        anon = os.environ.get("AZURE_STORAGE_ANON", "false").lower() not in ("false", "0", "f", "")
    if anon or "tenant_id" not in given:  # a connection string without a key or a signature
        config["skip_signature"] = True
        return None
    try:
        import azure.identity
    except ImportError:
        return None
    found = azure.identity.DefaultAzureCredential()

    def credentials() -> Any:
        token = found.get_token(_AZURE_TOKENS_FOR)
        return {"token": token.token, "expires_at": datetime.fromtimestamp(token.expires_on, UTC)}

    return credentials
