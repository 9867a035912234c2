"""The manifests as ``kubectl apply -k`` sends them."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).parents[2]
K8S = REPO / "k8s"


@functools.cache
def render(folder: str) -> str:
    command = ["kubectl", "kustomize", str(K8S / folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def manifests(folder: str) -> list[dict[str, Any]]:
    """What ``kubectl apply -k`` sends."""
    return list(yaml.safe_load_all(render(folder)))


def find(folder: str, kind: str) -> dict[str, Any]:
    (manifest,) = (m for m in manifests(folder) if m["kind"] == kind)
    return manifest
