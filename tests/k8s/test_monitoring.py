"""Alert rules, in promtool; the metrics that rules and dashboards name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.rendered import find


def alert_rules() -> list[dict[str, Any]]:
    groups = find("monitoring", "PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def exported_names() -> set[str]:
    """Names of all metrics as Prometheus has them, through Ray."""
    from nanochat_ray.on_ray.train import GAUGES
    from nanochat_ray.serve.reference import metric_rows

    names = {f"ray_nanochat_train_{name}" for name in GAUGES}
    for row in metric_rows():
        name, kind = re.findall(r"[\w]+", row)[:2]
        suffixes = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {f"ray_{name}{suffix}" for suffix in suffixes}
    return names


def panel_queries() -> list[str]:
    """Of all dashboards, as for metrics through Ray."""
    boards = find("monitoring", "ConfigMap")["data"]
    assert boards.keys() == {"serving.json", "training.json"}
    panels = [panel for text in boards.values() for panel in json.loads(text)["panels"]]
    queries = " \n".join(target["expr"] for panel in panels for target in panel["targets"])
    variables = {"${prefix}": "ray_nanochat", "$__rate_interval": "1m"}
    for name, value in variables.items():
        queries = queries.replace(name, value)
    return queries.split(" \n")


def test_every_metric_has_a_panel() -> None:
    queries = " ".join(panel_queries())
    # Of a histogram the quantiles are shown, which its buckets give.
    names = {n for n in exported_names() if not n.endswith(("_sum", "_count"))}
    assert {name for name in names if not re.search(rf"\b{name}\b", queries)} == set()


def test_rules_and_dashboards_name_real_metrics() -> None:
    from ray.serve._private import application_state, replica

    texts = [rule["expr"] for rule in alert_rules()] + panel_queries()
    names = {name for text in texts for name in re.findall(r"\bray_(?!io_)\w+", text)}
    serve = {name for name in names if name.startswith("ray_serve_")}
    source = Path(replica.__file__).read_text() + Path(application_state.__file__).read_text()
    assert {name for name in serve if f'"{name.removeprefix("ray_")}"' not in source} == set()
    assert names - serve <= exported_names()


def alert_cases() -> dict[str, Any]:
    """alerts.yaml, with the namespace of each series and what Prometheus adds to each alert."""
    text = (Path(__file__).parent / "alerts.yaml").read_text()
    cases: dict[str, Any] = yaml.safe_load(text)
    annotations = {rule["alert"]: rule["annotations"] for rule in alert_rules()}
    for test in cases["tests"]:
        for series in test["input_series"]:
            series["series"] = series["series"].replace("{", '{namespace="n",')
        for case in test["alert_rule_test"]:
            for alert in case.get("exp_alerts", ()):
                alert["exp_labels"]["namespace"] = "n"
                alert["exp_annotations"] = annotations[case["alertname"]]
    return cases


def test_each_alert_has_both_cases() -> None:
    cases = [case for test in alert_cases()["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alert_rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool (Prometheus) is missing"
)


def promtool(folder: Path, *args: str) -> None:
    run = subprocess.run(["promtool", *args], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    spec = find("monitoring", "PrometheusRule")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    cases = {"rule_files": ["rules.yaml"], **alert_cases()}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(cases))
    promtool(tmp_path, "check", "rules", "rules.yaml")
    promtool(tmp_path, "test", "rules", "tests.yaml")


@needs_promtool
def test_panels_show_the_first_event(tmp_path: Path) -> None:
    """All queries are PromQL; ratios have no value without traffic; a first refusal is counted."""
    queries = panel_queries()
    rules = [{"record": f"panel{i}", "expr": query} for i, query in enumerate(queries)]
    series = {
        "checkpoints_refused_total": "_x3 1x60",
        "checkpoint_swaps_total": "1+0x63",
        "prefix_cache_hits_total": "5+0x63",
        "prefix_cache_queries_total": "9+0x63",
    }
    values_by_name = {"checkpoints_refused_total": 1, "checkpoint_swaps_total": 0}
    groups = {"groups": [{"name": "panels", "rules": rules}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))
    case = {
        "interval": "1m",
        "input_series": [
            {"series": f'ray_nanochat_{name}{{model_name="m"}}', "values": values}
            for name, values in series.items()
        ],
        "promql_expr_test": [
            {
                "expr": query.replace("$namespace", ".*").replace("$model", "m"),
                "eval_time": "62m",
                "exp_samples": [
                    {"labels": "{}", "value": value}
                    for each, value in values_by_name.items()
                    if each == name
                ],
            }
            for query in queries
            for name in series
            if name in query
        ],
    }
    assert len(case["promql_expr_test"]) == 4
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    promtool(tmp_path, "check", "rules", "rules.yaml")
    promtool(tmp_path, "test", "rules", "tests.yaml")
