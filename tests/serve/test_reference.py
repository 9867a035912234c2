"""README.md of serve/ has every endpoint, field and metric of the server."""

from __future__ import annotations

import re
from pathlib import Path

from nanochat_ray.serve import reference
from nanochat_ray.serve.metrics import EngineMetrics, PrometheusSink, RequestMetrics

TEXT = reference.README.read_text(encoding="utf-8")
SERVE = reference.README.parent


def test_the_reference_is_up_to_date() -> None:
    assert reference.update(TEXT) == TEXT, "run python -m nanochat_ray.serve.reference"


def test_every_field_and_endpoint_is_listed() -> None:
    api = reference.document()
    for path, methods in api["paths"].items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in TEXT
    for name, schema in api["components"]["schemas"].items():
        section = TEXT.partition(f"### {name}\n")[2].partition("\n### ")[0]
        for field in schema.get("properties", {}):
            assert f"| `{field}`" in section, f"{name}.{field}"


def test_every_metric_of_the_page_is_listed() -> None:
    sink = PrometheusSink("tiny")
    timer = RequestMetrics(sink).timer()
    timer.tokens(1)
    timer.end("stop")
    EngineMetrics(sink).update_all({"0": {"kernels": "amx"}})
    names = set(re.findall(r"^# TYPE (\w+) (?!unknown)", sink.text().decode(), re.MULTILINE))
    names = {name for name in names if not name.endswith("_created")}
    assert len(names) >= 12
    assert [name for name in sorted(names) if f"| `{name}" not in TEXT] == []


def test_files_that_the_readme_names_exist() -> None:
    text = TEXT.partition(reference.BEGIN)[0]
    files = set(re.findall(r"`([\w/]+\.py)`", text))
    roots = (
        SERVE,
        SERVE.parent,
        SERVE / "openai",
        Path(__file__).parents[2],
        Path(__file__).parent,
    )
    missing = [f for f in files if not any((root / f).exists() for root in roots)]
    assert missing == []
