"""The serving dashboard's queries in a real Prometheus that scrapes a server's metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanochat_ray.serve.metrics import EngineMetrics, FollowMetrics, PrometheusSink, RequestMetrics
from tests.k8s.rendered import find
from tests.waiting import wait_for


class Busy:
    """A server's metrics; each scrape finds more work done."""

    def __init__(self) -> None:
        self.sink = PrometheusSink("m")
        self.requests, self.engines = RequestMetrics(self.sink), EngineMetrics(self.sink)
        self.follow = FollowMetrics(self.sink)
        self.scrapes = 0

    def text(self) -> bytes:
        self.scrapes += 1
        count = self.scrapes
        timer = self.requests.timer()
        timer.accept(7)
        timer.tokens(1)
        timer.tokens(2)
        timer.end("stop")
        self.requests.refusals(1, "429")
        counters = ("num_lookup_tokens", "num_hit_tokens", "preemptions", "num_queued", "steps")
        counters += ("queue_seconds", "num_draft_tokens", "num_accepted_tokens", "step_seconds")
        gauges = {"running": 2, "waiting": 1, "kv_cache_usage": 0.5}
        labels = {"kernels": "amx", "weight_version": "step-000001"}
        self.engines.update("0", {**dict.fromkeys(counters, count), **gauges, **labels})
        self.follow.update({"num_swaps": count, "num_refusals": count})
        return self.sink.text()


@pytest.fixture
def page() -> Iterator[str]:
    """Address of the metrics."""
    busy = Busy()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = busy.text()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def prometheus(page: str, tmp_path: Path) -> Iterator[str]:
    """Address of a Prometheus that scrapes the page five times a second."""
    scrape = {"job_name": "one", "static_configs": [{"targets": [page]}]}
    config = {"global": {"scrape_interval": "200ms"}, "scrape_configs": [scrape]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    log = tmp_path / "log"
    command = ["prometheus", "--config.file=config.yaml", "--storage.tsdb.path=data"]
    command += ["--web.listen-address=127.0.0.1:0"]
    with log.open("wb") as file, subprocess.Popen(command, cwd=tmp_path, stderr=file) as process:
        try:
            pattern = r"Listening on.*address=(127\.0\.0\.1:\d+)"
            wait_for(lambda: re.search(pattern, log.read_text()), 120, "Prometheus")
            match = re.search(pattern, log.read_text())
            assert match is not None
            yield f"http://{match[1]}"
        finally:
            process.kill()


def query(address: str, expression: str) -> list[Any]:
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=60) as response:
        result: list[Any] = json.load(response)["data"]["result"]
    return result


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is missing")
def test_every_serving_panel_shows_data(prometheus: str) -> None:
    board = json.loads(find("monitoring", "ConfigMap")["data"]["serving.json"])
    values = {"${prefix}": "nanochat", "$__rate_interval": "5s", "$namespace": ".*", "$model": ".*"}
    expressions = {target["expr"] for panel in board["panels"] for target in panel["targets"]}
    assert len(expressions) > 20
    for expression in expressions:
        text = expression
        for name, value in values.items():
            text = text.replace(name, value)

        def has_data(text: str = text) -> bool:
            return any(row["value"][1] != "NaN" for row in query(prometheus, text))

        wait_for(has_data, 60, f"a value of {text}")
