"""Writes the reference part of README.md from /openapi.json and the metrics, when it is run as
``python -m nanochat_ray.serve.reference``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.client import EngineClient
from nanochat_ray.serve.metrics import EngineMetrics, FollowMetrics, Record, RequestMetrics
from nanochat_ray.text.tokenizer import Tokenizer

README = Path(__file__).with_name("README.md")
BEGIN = "<!-- reference: written by python -m nanochat_ray.serve.reference -->\n"
END = "<!-- end of reference -->\n"
_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_LENGTHS = (("minLength", "≥"), ("minItems", "≥"), ("maxItems", "≤"), ("maxProperties", "≤"))


class _Names:
    """A ``Sink`` that lists the metrics."""

    def __init__(self) -> None:
        self.rows: list[str] = []

    def _add(self, kind: str, name: str, about: str, label: str) -> Record:
        labels = f"`model_name`, `{label}`" if label else "`model_name`"
        self.rows.append(f"| `{name}` | {kind} | {labels} | {about} |")
        return lambda value, key: None

    def counter(self, name: str, about: str, label: str = "") -> Record:
        return self._add("counter", f"{name}_total", about, label)

    def gauge(self, name: str, about: str, label: str = "") -> Record:
        return self._add("gauge", name, about, label)

    def histogram(self, name: str, about: str, buckets: Sequence[float]) -> Record:
        return self._add("histogram", name, about, "")

    def forget(self, key: str) -> None:
        pass


def metric_rows() -> list[str]:
    names = _Names()
    RequestMetrics(names)
    EngineMetrics(names)
    FollowMetrics(names)
    return names.rows


def document() -> dict[str, Any]:
    client = cast(EngineClient, None)  # nothing is sent
    return build_app(client, Tokenizer.bytes_only(), "model", 1024).openapi()


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words: ``number ≥ 0 ≤ 2``, ``list of ChatMessage``."""
    if reference := schema.get("$ref"):
        return str(reference).rpartition("/")[2]
    branches = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if branches:
        return " or ".join(dict.fromkeys(_type(b) for b in branches if b.get("type") != "null"))
    if "const" in schema:
        return f'"{schema["const"]}"'
    if "enum" in schema:
        return " or ".join(f'"{value}"' for value in schema["enum"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        kind = f"list of {_type(schema.get('items', {}))}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"object of {_type(schema['additionalProperties'])}"
    limits = [f"{sign} {_number(schema[name])}" for name, sign in _BOUNDS if name in schema]
    limits += [f"length {sign} {schema[name]}" for name, sign in _LENGTHS if name in schema]
    return " ".join([kind, *limits])


def _endpoints(api: dict[str, Any]) -> Iterator[str]:
    yield "| endpoint | request | response | event of a stream |"
    yield "|---|---|---|---|"
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {})
            answer = operation["responses"]["200"]["content"]
            cells = [body.get("application/json"), answer.get("application/json")]
            cells.append(answer.get("text/event-stream"))
            texts = [_type(cell["schema"]) if cell else "" for cell in cells]
            yield f"| `{method.upper()} {path}` | {' | '.join(texts)} |"


def _fields(api: dict[str, Any]) -> Iterator[str]:
    schemas = api["components"]["schemas"].items()
    for name, schema in sorted(schemas, key=lambda s: (not s[0].endswith("Request"), s[0])):
        if "properties" not in schema:
            continue
        mandatory = schema.get("required", ())
        yield f"\n### {name}\n"
        yield "| field | type | meaning |"
        yield "|---|---|---|"
        for field, definition in schema["properties"].items():
            mark = " (required)" if name.endswith("Request") and field in mandatory else ""
            kind = _type(definition).replace("|", "\\|")
            about = definition.get("description", "").replace("|", "\\|")
            yield f"| `{field}`{mark} | {kind} | {about} |"


def reference() -> str:
    api = document()
    lines = ["## Endpoints\n", *_endpoints(api), "\n## Metrics\n"]
    lines += ["| metric | kind | labels | meaning |", "|---|---|---|---|", *metric_rows()]
    lines += ["\n## Fields", *_fields(api)]
    return "\n".join(lines) + "\n"


def update(text: str) -> str:
    """README.md with its reference part replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(update(README.read_text(encoding="utf-8")), encoding="utf-8")
