"""Conditional writes to object stores by obstore: pyarrow has none."""

from __future__ import annotations

from urllib.parse import parse_qsl

import obstore
from obstore.store import GCSStore, S3Store


def create(scheme: str, path: str, options: str, name: str, data: bytes) -> bool:
    """Puts ``data`` at ``name`` below ``path`` (bucket and prefix); False if the key exists.

    The first three are those of ``storage.split_uri``. Credentials come from the environment.
    Raises OSError.
    """
    bucket, _, prefix = path.partition("/")
    key = "/".join(part for part in (prefix.strip("/"), name) if part)
    store = _s3(bucket, dict(parse_qsl(options))) if scheme == "s3" else GCSStore(bucket)
    try:
        obstore.put(store, key, data, mode="create")
    except obstore.exceptions.AlreadyExistsError:
        return False
    except obstore.exceptions.BaseError as error:
        reason = str(error).partition("\n")[0]
        raise OSError(f"storage {scheme}://{path}: {name} cannot be written: {reason}") from None
    return True


def _s3(bucket: str, options: dict[str, str]) -> S3Store:
    config = {"region": options["region"]} if "region" in options else {}
    endpoint, scheme = options.get("endpoint_override"), options.get("scheme", "https")
    if endpoint:
        config["endpoint"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
    return S3Store(bucket, config=config, client_options={"allow_http": scheme == "http"})  # type: ignore[arg-type]
