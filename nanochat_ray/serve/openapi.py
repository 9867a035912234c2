"""Adds to /openapi.json what FastAPI cannot derive: the shape of the events of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import TypeAdapter

REFERENCE = "#/components/schemas/{model}"


def add_stream_schemas(app: FastAPI, streams: Mapping[str, Any]) -> None:
    """``streams``: the type of an event's data by the path of its endpoint."""
    document = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = document()
            adapters = [(path, "serialization", TypeAdapter(t)) for path, t in streams.items()]
            by_path, definitions = TypeAdapter.json_schemas(adapters, ref_template=REFERENCE)  # type: ignore[arg-type]
            schema["components"]["schemas"] |= definitions["$defs"]
            for (path, _), event in by_path.items():
                content = schema["paths"][path]["post"]["responses"]["200"]["content"]
                content["text/event-stream"] = {"schema": event}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
