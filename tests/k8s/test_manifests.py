"""The manifests against the schemas and rules of Kubernetes and KubeRay; the flags of the jobs."""

from __future__ import annotations

import copy
import functools
import gzip
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import kubernetes_validate
import pytest
import yaml

from nanochat_ray.cli.flags import all_flags
from tests.k8s.rendered import K8S, REPO, find, manifests, render

KUBERNETES = "1.33"
# The v1 schemas of KubeRay's CRDs (controller-gen 0.16.5), descriptions and defaults left out.
SCHEMAS = json.loads(gzip.decompress((Path(__file__).parent / "kuberay-v1.json.gz").read_bytes()))
CUSTOM = {"RayJob", "RayService", "LocalQueue", "PodMonitor", "PrometheusRule"}
"""Kinds that Kubernetes itself does not know."""
FOLDERS = ("train", "train-two-nodes", "rl", "serve", "eval", "example", "monitoring")


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


def broken_rules(schema: Any, value: Any) -> Iterator[str]:
    """Messages of the schema's CEL rules that ``value`` breaks; rules of updates see no change."""
    if not isinstance(schema, dict):
        return
    for rule in schema.get("x-kubernetes-validations", ()):
        environment = celpy.Environment()
        program = environment.program(environment.compile(rule["rule"]))
        cel = celpy.json_to_cel(value)
        if not program.evaluate({"self": cel, "oldSelf": cel}):
            yield rule["message"]
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from broken_rules(schema.get("properties", {}).get(name), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from broken_rules(schema.get("items"), inner)


def validate(manifest: dict[str, Any]) -> None:
    validator(manifest["kind"]).validate(manifest)
    assert list(broken_rules(SCHEMAS[manifest["kind"]], manifest)) == []


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec["rayClusterConfig"]


def pod_specs(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of a manifest, those of a Ray cluster too."""
    spec = manifest["spec"]
    if manifest["kind"] not in ("RayJob", "RayService"):
        return [spec["template"]["spec"]] if "template" in spec else []
    groups = [cluster_of(manifest)["headGroupSpec"], *cluster_of(manifest)["workerGroupSpecs"]]
    submitter = [spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else []
    return [template["spec"] for template in submitter + [g["template"] for g in groups]]


PODS = [
    pytest.param(pod, id=f"{folder}-{m['kind']}-{i}")
    for folder in FOLDERS[:-1]
    for m in manifests(folder)
    if "spec" in m
    for i, pod in enumerate(pod_specs(m))
]
JOBS = ("train", "train-two-nodes", "rl")
RAY = [*((f, "RayJob") for f in JOBS), ("serve", "RayService"), ("example", "RayService")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubernetes_accepts_the_manifests(folder: str) -> None:
    for manifest in manifests(folder):
        namespace = manifest["metadata"].get("namespace")
        if manifest["kind"] not in ("Namespace", "PriorityClass"):
            assert namespace == ("team-a" if folder == "example" else "nanochat")
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(("folder", "kind"), RAY)
def test_kuberay_accepts_the_manifest_and_no_typo(folder: str, kind: str) -> None:
    manifest = find(folder, kind)
    validate(manifest)
    for change in (
        lambda m: cluster_of(m).update(enableInTreeAutoscalling=True),
        lambda m: cluster_of(m)["workerGroupSpecs"][0].update(maxReplicas="many"),
        lambda m: cluster_of(m)["headGroupSpec"].pop("template"),
        lambda m: cluster_of(m)["authOptions"].update(mode="tokens"),
    ):
        broken = copy.deepcopy(manifest)
        change(broken)
        with pytest.raises(jsonschema.ValidationError):
            validate(broken)
    broken = copy.deepcopy(manifest)
    broken["spec"]["rayClusterSpec" if kind == "RayJob" else "rayClusterConfig"]["managedBy"] = "me"
    assert list(broken_rules(SCHEMAS[kind], broken)) != []


@pytest.mark.parametrize("pod", PODS)
def test_pods_are_restricted(pod: dict[str, Any]) -> None:
    """Pod security level "restricted", which the namespace enforces, and no needless token."""
    template = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
    kubernetes_validate.validate(template, KUBERNETES, strict=True)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["serviceAccountName"] == "nanochat"
    assert pod["priorityClassName"] in ("nanochat-serve", "nanochat-train")
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"].keys() == {"requests", "limits"}


@pytest.mark.parametrize(("folder", "kind"), RAY)
def test_clusters_have_token_gpus_and_storage(folder: str, kind: str) -> None:
    cluster = cluster_of(find(folder, kind))
    version = f'"ray[default,data,train,serve]=={cluster["rayVersion"]}"'
    assert version in (REPO / "pyproject.toml").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    assert any("nvidia.com/gpu" in c["resources"]["limits"] for c in containers)
    for container in containers:
        assert container["envFrom"][0]["configMapRef"]["name"] == "storage"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_two_nodes_start_together() -> None:
    job = find("train-two-nodes", "RayJob")
    queue = find("train-two-nodes", "LocalQueue")["metadata"]["name"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": queue}
    assert job["spec"]["suspend"] is True  # Kueue starts it
    cluster = cluster_of(job)
    assert "enableInTreeAutoscaling" not in cluster
    gpu = cluster["workerGroupSpecs"][0]
    assert gpu["groupName"] == "gpu"
    (container,) = gpu["template"]["spec"]["containers"]
    count = gpu["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {e["value"] for e in (*head["env"], *container["env"])} == {str(count)} == {"16"}


def test_serving_survives_its_head_and_drains() -> None:
    from nanochat_ray.on_ray.serve.deployment import GRACEFUL_SHUTDOWN_S

    cluster = cluster_of(find("serve", "RayService"))
    service = next(m for m in manifests("serve") if m["kind"] == "Service")
    redis = cluster["gcsFaultToleranceOptions"]
    assert redis["redisAddress"] == f"{service['metadata']['name']}:6379"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        variables = group["template"]["spec"]["containers"][0]["env"]
        assert {"name": "RAY_SERVE_ENABLE_HA_PROXY", "value": "1"} in variables
    pod = cluster["workerGroupSpecs"][0]["template"]["spec"]
    *_, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert GRACEFUL_SHUTDOWN_S < int(seconds) < pod["terminationGracePeriodSeconds"]
    labels = cluster["workerGroupSpecs"][0]["template"]["metadata"]["labels"]
    budget = find("serve", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]
    assert budget.items() <= labels.items()
    for constraint in pod["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()


def test_one_tag_names_every_image(tmp_path: Path) -> None:
    for folder in ("train", "serve", "eval"):
        images = set(re.findall(r"image: (nanochat-ray\S*)", render(folder)))
        version = re.search(r'^version = "(.*)"', (REPO / "pyproject.toml").read_text(), re.M)
        assert version is not None
        assert images == {f"nanochat-ray:{version[1]}"}


def test_a_site_changes_registry_storage_host_and_nodes() -> None:
    text = render("example")
    assert set(re.findall(r"image: (\S+)/", text)) == {
        "registry.example.com/team-a",
        "registry.example.com/mirror",
    }
    assert "BUCKET" not in text
    assert "host: chat.example.com" not in text
    worker = cluster_of(find("example", "RayService"))["workerGroupSpecs"][0]
    assert worker["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L40S"}


def flags_of(job: str) -> set[str]:
    args = importlib.import_module(f"nanochat_ray.cli.{job}").Args
    return {flag.name for flag in all_flags(args)}


def commands() -> list[list[str]]:
    text = (
        find("train", "RayJob")["spec"]["entrypoint"] + find("rl", "RayJob")["spec"]["entrypoint"]
    )
    (container,) = find("eval", "Job")["spec"]["template"]["spec"]["containers"]
    text += container["command"][-1] + "\n\n"
    text += (REPO / "cluster" / "gpu-cloud.yaml").read_text().replace("#", "").replace("\\\n", " ")
    matches = re.findall(
        r"python (?:/app/)?jobs/.*?(?=\n\s*python|\n\s*'|\n *ray |\n\n)", text, re.DOTALL
    )
    return [shlex.split(command) for command in matches]


def test_the_flags_of_the_jobs_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO))
    matches = commands()
    assert len(matches) == 7
    for command in matches:
        job = Path(command[1]).stem
        flags = {word for word in command if word.startswith("--")}
        assert flags <= flags_of(job), f"{job}: {flags - flags_of(job)}"


def test_the_serve_configurations_are_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    from nanochat_ray.config import from_json
    from nanochat_ray.on_ray.config import ServeConfig

    for text in (
        find("serve", "RayService")["spec"]["serveConfigV2"],
        (REPO / "cluster" / "serve.yaml").read_text(),
    ):
        schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
        (application,) = schema.applications
        module, _, name = application.import_path.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert from_json(ServeConfig, application.args).run == "chat"


def test_in_place_scaling_begins_with_the_numbers_of_args() -> None:
    """The policy is ours: without it Serve would scale by its own count of requests."""
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    from nanochat_ray.config import from_json
    from nanochat_ray.on_ray.config import ServeConfig
    from nanochat_ray.on_ray.serve.deployment import _ingress_deployment, _replicas

    text = find("serve", "RayService")["spec"]["serveConfigV2"]
    (application,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
    config = from_json(ServeConfig, application.args)
    engine, ingress = application.deployments
    assert (engine.name, ingress.name) == ("engine", "ingress")
    scaling = AutoscalingConfig(**engine.autoscaling_config).model_dump()
    assert scaling == _replicas(config)["autoscaling_config"].model_dump()
    assert ingress.num_replicas == _ingress_deployment(config).num_replicas


def test_only_the_endpoint_is_open_to_all() -> None:
    """And the pod of cert-manager that proves who owns the host."""
    policies = [m["spec"] for m in manifests("serve") if m["kind"] == "NetworkPolicy"]
    open_ports = {
        (*policy["podSelector"].get("matchLabels", {}), port["port"])
        for policy in policies
        for rule in policy["ingress"]
        if "from" not in rule
        for port in rule["ports"]
    }
    assert open_ports == {(8000,), ("acme.cert-manager.io/http01-solver", 8089)}


def test_every_file_is_in_a_kustomization() -> None:
    for folder in (K8S, *(path for path in K8S.iterdir() if path.is_dir())):
        resources = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
        files = {p.name for p in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert files == {name for name in resources if name.endswith(".yaml")}


def test_the_launcher_file_is_valid() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((REPO / "cluster" / "gpu-cloud.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(cluster)))
    assert cluster["head_node_type"] in cluster["available_node_types"]
    # What the launcher runs in the container.
    image = (REPO / "cluster" / "Dockerfile").read_text()
    assert {"rsync", "openssh-client", "boto3", "HOME=/home/ray"} <= set(image.split())
    cluster["providr"] = {}
    with pytest.raises(jsonschema.ValidationError):
        validate_config(cluster)


def test_no_secret_is_in_a_file() -> None:
    files = [path for path in (REPO / "cluster").rglob("*") if path.is_file()]
    for path in [*K8S.rglob("*.yaml"), *files]:
        assert not re.search(r"AKIA[0-9A-Z]{16}|kind: Secret", path.read_text()), path
