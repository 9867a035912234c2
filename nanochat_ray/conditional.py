"""Conditional writes to object stores by obstore: pyarrow has none."""

from __future__ import annotations

import configparser
import os
from urllib.parse import parse_qsl

import obstore
from obstore.store import GCSStore, S3Store


def create(
    scheme: str, path: str, options: str, name: str, data: bytes, *, region: str = ""
) -> bool:
    """Puts ``data`` at ``name`` below ``path`` (bucket and prefix); False if the key exists.

    The first three are those of ``storage.split_uri``. Credentials come from the environment or
    ``~/.aws/credentials``; the endpoint from the environment where the options name none.
    ``region`` is that of an S3 bucket. Raises OSError.
    """
    bucket, _, prefix = path.partition("/")
    key = "/".join(part for part in (prefix.strip("/"), name) if part)
    store = (
        s3_store(bucket, dict(parse_qsl(options)), region) if scheme == "s3" else GCSStore(bucket)
    )
    try:
        obstore.put(store, key, data, mode="create")
    except obstore.exceptions.AlreadyExistsError:
        return False
    except obstore.exceptions.BaseError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"storage {scheme}://{path}: {name} cannot be written: {reason}") from None
    return True


def s3_store(bucket: str, options: dict[str, str], region: str) -> S3Store:
    """The bucket where pyarrow has it: obstore would look in us-east-1, and refuse HTTP."""
    config = _shared_credentials() | ({"region": region} if region else {})
    endpoint = options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL") or ""
    if endpoint:
        scheme = options.get("scheme", "https")
        config["endpoint"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
    allow_http = config.get("endpoint", "").startswith("http://")
    return S3Store(bucket, config=config, client_options={"allow_http": allow_http})  # type: ignore[arg-type]


def _shared_credentials() -> dict[str, str]:
    """Keys from the file of AWS's tools, which pyarrow reads too; none if the environment has
    some."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    profiles = configparser.RawConfigParser(strict=False)
    try:
        profiles.read(os.path.expanduser(file), encoding="utf-8")
    except configparser.Error as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read: {reason}") from None
    profile = os.environ.get("AWS_PROFILE") or "default"
    keys = dict(profiles.items(profile)) if profiles.has_section(profile) else {}
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
    return {name: keys[name] for name in names if name in keys}
