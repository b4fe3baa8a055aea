"""Which settings of obstore the options and variables of gcsfs and adlfs become."""

from __future__ import annotations

import json
from typing import Any

import pytest

from taskckpt._stores import obstore_clouds as _obstore_clouds
from taskckpt._stores import parse
from taskckpt.errors import DeniedError, UsageError

gcs_settings: Any = _obstore_clouds.gcs_settings
azure_settings: Any = _obstore_clouds.azure_settings

GS = parse("gs://bucket/run/task")
AZ = parse("az://bucket/run/task")
KEY = "a2V5"


@pytest.fixture(autouse=True)
def _nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))


# --- gs:// -------------------------------------------------------------------------------------


def test_a_token_of_google():
    settings = gcs_settings(
        GS, {"token": "ya29.abc", "project": "p", "access": "read_write", "skip_instance_cache": True}
    )
    assert (settings.store, settings.bucket, settings.unhonoured) == ("GCSStore", "bucket", ())
    assert settings.config == {"base_url": "https://storage.googleapis.com"}
    assert settings.url == "https://storage.googleapis.com/bucket"
    assert settings.credentials() == {"token": "ya29.abc", "expires_at": None}


def test_where_google_is(monkeypatch):
    def base(**options):
        return gcs_settings(GS, {"token": "t", **options}).config["base_url"]

    monkeypatch.setenv("GOOGLE_CLOUD_UNIVERSE_DOMAIN", "apis.example")
    assert base() == "https://storage.apis.example"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "default")
    assert base() == "https://storage.apis.example"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "localhost:4443")
    assert base() == "http://localhost:4443"
    assert base(endpoint_url="https://elsewhere/") == "https://elsewhere"


def authorized_user():
    return {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "r"}


@pytest.mark.parametrize("way", ["token file", "token dict", "variable", "gcloud's file"])
def test_credentials_of_google_in_files(way, tmp_path, monkeypatch):
    pytest.importorskip("google.auth", reason="NOT TESTED: google-auth is not installed")
    path = tmp_path / "key.json"
    path.write_text(json.dumps(authorized_user()))
    options = {"token file": {"token": str(path)}, "token dict": {"token": authorized_user()}}.get(way, {})
    if way == "variable":
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    if way == "gcloud's file":
        (tmp_path / "gcloud").mkdir()
        path.rename(tmp_path / "gcloud" / "application_default_credentials.json")
    asked = []

    def refresh(self, request):
        asked.append(self.refresh_token)
        self.token, self.expiry = "fresh", None

    monkeypatch.setattr("google.oauth2.credentials.Credentials.refresh", refresh)
    settings = gcs_settings(GS, options)
    assert settings.unhonoured == ()
    assert [settings.credentials() for _ in range(2)] == [{"token": "fresh", "expires_at": None}] * 2
    assert asked == ["r"], "renewed only when it has run out"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"token": "anon"}, "anonymous access"),
        ({}, "anonymous access"),
        ({"token": "browser"}, "~/.gcs_tokens of gcsfs"),
        ({"token": {"refresh_token": "r"}}, "token without a type"),
        ({"token": "t", "requester_pays": True}, "requester_pays"),
        ({"token": "t", "session_kwargs": {"trust_env": True}}, "session_kwargs"),
    ],
)
def test_what_obstore_does_not_know_of_google(options, name):
    pytest.importorskip("google.auth", reason="NOT TESTED: google-auth is not installed")
    assert list(gcs_settings(GS, options).unhonoured) == [name]


def test_a_file_that_holds_no_credentials(tmp_path):
    pytest.importorskip("google.auth", reason="NOT TESTED: google-auth is not installed")
    (tmp_path / "key.json").write_text("{}")
    with pytest.raises(DeniedError):
        gcs_settings(GS, {"token": str(tmp_path / "key.json")})


# --- az:// -------------------------------------------------------------------------------------


def given(settings):
    return settings.config["account_name"], settings.config["endpoint"], settings.credentials()


@pytest.mark.parametrize(
    ("text", "account", "endpoint", "credentials"),
    [
        (
            f"DefaultEndpointsProtocol=https;AccountName=me;AccountKey={KEY}==;EndpointSuffix=core.chinacloudapi.cn",
            *("me", "https://me.blob.core.chinacloudapi.cn", {"access_key": f"{KEY}=="}),
        ),
        (
            f"AccountName=me;AccountKey={KEY};BlobEndpoint=http://127.0.0.1:1/me/;",
            *("me", "http://127.0.0.1:1/me", {"access_key": KEY}),
        ),
        (
            "BlobEndpoint=https://me.blob.core.windows.net/;SharedAccessSignature=sv=1&sig=a%3D",
            *("me", "https://me.blob.core.windows.net", {"sas_token": "sv=1&sig=a%3D"}),
        ),
        (
            "BlobEndpoint=http://127.0.0.1:1/me;SharedAccessSignature=sv=1",
            *("me", "http://127.0.0.1:1/me", {"sas_token": "sv=1"}),
        ),
    ],
)
def test_connection_strings(text, account, endpoint, credentials, monkeypatch):
    expected = (account, endpoint, {**credentials, "expires_at": None})
    assert given(azure_settings(AZ, {"connection_string": text})) == expected
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    assert given(azure_settings(AZ, {"account_name": "other", "account_key": "other"})) == expected, "as adlfs has it"


def test_accounts_and_keys(monkeypatch):
    expected = ("me", "https://me.blob.core.windows.net", {"access_key": KEY, "expires_at": None})
    assert given(azure_settings(AZ, {"account_name": "me", "account_key": KEY, "sas_token": "?sv=1"})) == expected
    there = parse("abfs://bucket@me.dfs.core.windows.net/x")
    settings = azure_settings(there, {"account_key": KEY})
    assert given(settings) == expected
    assert settings.bucket == "bucket"
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "me")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
    assert given(azure_settings(AZ, {})) == expected
    assert azure_settings(AZ, {"account_host": "me.blob.local"}).config["endpoint"] == "https://me.blob.local"
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=1")
    assert azure_settings(AZ, {}).credentials() == {"sas_token": "sv=1", "expires_at": None}


def test_a_service_principal():
    who = {"client_id": "i", "client_secret": "s", "tenant_id": "t"}
    settings = azure_settings(AZ, {"account_name": "me", **who})
    assert settings.credentials is None
    assert settings.config.items() >= {**who, "credential_type": "client_secret"}.items()


def test_nobody_in_particular(monkeypatch):
    assert azure_settings(AZ, {"account_name": "me", "anon": True}).config["skip_signature"] is True
    monkeypatch.setenv("AZURE_STORAGE_ANON", "true")
    assert azure_settings(AZ, {"account_name": "me"}).config["skip_signature"] is True
    with pytest.raises(UsageError, match="names the Azure account"):
        azure_settings(AZ, {"account_key": KEY})


def test_whoever_the_machine_is(monkeypatch):
    identity = pytest.importorskip("azure.identity", reason="NOT TESTED: azure-identity is not installed")

    def get_token(self, scope):
        return identity._credentials.default.AccessToken(f"for {scope}", 2_000_000_000)

    monkeypatch.setattr(identity.DefaultAzureCredential, "get_token", get_token)
    found = azure_settings(AZ, {"account_name": "me"}).credentials()
    assert found["token"] == "for https://storage.azure.com/.default"
    assert found["expires_at"].timestamp() == 2_000_000_000


@pytest.mark.parametrize("name", ["credential", "location_mode", "request_session", "exclude_cli_credential"])
def test_what_obstore_does_not_know_of_azure(name):
    assert list(azure_settings(AZ, {"account_name": "me", name: "secondary"}).unhonoured) == [name]
