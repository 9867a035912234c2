"""The manifests against KubeRay's own schemas, Ray's, and the flags of the jobs they call."""

from __future__ import annotations

import copy
import functools
import gzip
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from nanochat_ray.cli.flags import all_flags

REPO = Path(__file__).parents[2]
K8S = REPO / "k8s"
# The v1 schemas of KubeRay's CRDs (controller-gen 0.16.5), descriptions and defaults left out.
SCHEMAS = json.loads(gzip.decompress((Path(__file__).parent / "kuberay-v1.json.gz").read_bytes()))
RAY = sorted(K8S.glob("ray-*.yaml"))


def strict(schema: Any) -> Any:
    """Refuses fields that the schema does not know, as the API server drops or refuses them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict_schema = {key: strict(value) for key, value in schema.items()}
    is_closed = (
        isinstance(strict_schema.get("properties"), dict) and strict_schema.get("type") == "object"
    )
    if is_closed and not strict_schema.get("x-kubernetes-preserve-unknown-fields"):
        strict_schema.setdefault("additionalProperties", False)
    if strict_schema.get("x-kubernetes-int-or-string"):
        strict_schema.pop("type", None)
    return strict_schema


@functools.cache
def validator(kind: str) -> Any:
    schema = strict(SCHEMAS[kind])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.validators.validator_for(schema)(schema)


def validate(manifest: dict[str, Any]) -> None:
    validator(manifest["kind"]).validate(manifest)


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.name)
def test_a_manifest_is_valid_and_a_typo_in_it_is_not(path: Path) -> None:
    manifest = load(path)
    validate(manifest)
    kind, variant = re.fullmatch(r"ray-(\w+)\.(\w+)\.yaml", path.name).groups()
    assert (manifest["kind"].lower(), manifest["metadata"]["name"]) == (f"ray{kind}", variant)
    cluster = "rayClusterSpec" if manifest["kind"] == "RayJob" else "rayClusterConfig"
    for change in (
        lambda m: m["spec"][cluster].update(enableInTreeAutoscalling=True),
        lambda m: m["spec"][cluster]["workerGroupSpecs"][0].update(maxReplicas="many"),
        lambda m: m["spec"][cluster]["headGroupSpec"].pop("template"),
    ):
        broken = copy.deepcopy(manifest)
        change(broken)
        with pytest.raises(jsonschema.ValidationError):
            validate(broken)


@pytest.mark.parametrize("path", RAY, ids=lambda path: path.name)
def test_clusters_scale_and_have_gpus_and_storage(path: Path) -> None:
    spec = load(path)["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"]
    assert (
        f'"ray[default,data,train,serve]=={cluster["rayVersion"]}"'
        in (REPO / "pyproject.toml").read_text()
    )
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert any("nvidia.com/gpu" in c["resources"]["limits"] for c in containers)
    for container in containers:
        assert container["envFrom"][0]["configMapRef"]["name"] == "storage"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def flags_of(job: str) -> set[str]:
    args = importlib.import_module(f"nanochat_ray.cli.{job}").Args
    return {flag.name for flag in all_flags(args)}


def commands() -> list[list[str]]:
    text = load(K8S / "ray-job.train.yaml")["spec"]["entrypoint"]
    text += (REPO / "cluster" / "gpu-cloud.yaml").read_text().replace("#", "").replace("\\\n", " ")
    matches = re.findall(
        r"python (?:/app/)?jobs/.*?(?=\n\s*python|\n\s*'|\n *ray |\n\n)", text, re.DOTALL
    )
    return [shlex.split(command) for command in matches]


def test_the_flags_of_the_jobs_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO))
    matches = commands()
    assert len(matches) == 5
    for command in matches:
        job = Path(command[1]).stem
        flags = {word for word in command if word.startswith("--")}
        assert flags <= flags_of(job), f"{job}: {flags - flags_of(job)}"


def test_the_serve_configurations_are_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    from nanochat_ray.config import from_json
    from nanochat_ray.on_ray.config import ServeConfig

    for text in (
        load(K8S / "ray-service.serve.yaml")["spec"]["serveConfigV2"],
        (REPO / "cluster" / "serve.yaml").read_text(),
    ):
        schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
        (application,) = schema.applications
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert from_json(ServeConfig, application.args).run == "chat"


def test_the_bases_list_what_is_there() -> None:
    later = {"kustomization.yaml", "ray-service.serve.yaml"}  # needs what the job makes
    for folder in (K8S, K8S / "base"):
        resources = load(folder / "kustomization.yaml")["resources"]
        there = {p.name for p in folder.iterdir()} - later
        assert set(resources) == there
    policy = load(K8S / "base" / "network-policy.yaml")
    open_ports = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert open_ports == [[{"port": 8000, "protocol": "TCP"}]]


def test_the_launcher_file_is_valid() -> None:
    import ray

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = load(REPO / "cluster" / "gpu-cloud.yaml")
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    cluster["providr"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, schema)


def test_no_secret_is_in_a_file() -> None:
    files = [path for path in (REPO / "cluster").rglob("*") if path.is_file()]
    for path in [*K8S.rglob("*.yaml"), *files]:
        assert not re.search(r"AKIA[0-9A-Z]{16}|kind: Secret", path.read_text()), path
