"""The checks of ``bench gpu``: as they are on a GPU; what a machine without one can show."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

from nanochat_ray.bench import gpu, gpu_checks
from nanochat_ray.bench.gpu_report import Report, relative_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

PROGRAM = """
import importlib.abc, runpy, sys

class Refusal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refusal())
from nanochat_ray.bench.gpu_report import replace_missing_packages
replace_missing_packages()
from nanochat_ray.bench import gpu_checks, gpu_serve, gpu_train
sys.argv = ["gpu", "check"]
runpy.run_module("nanochat_ray.bench.gpu", run_name="__main__")
"""


@pytest.mark.slow
def test_torch_and_numpy_are_enough() -> None:
    """Without any other dependency it gets as far as to miss the GPU."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[\[=<>~!; ]", line)[0].lower() for line in project["dependencies"]}
    assert {"torch", "ray"} <= names
    names |= {"regex", "httpx"}  # of dependencies of these
    requirements = {"torch", "numpy", "typing_extensions"}
    modules = packages_distributions().items()
    missing = [
        module
        for module, distributions in modules
        if {name.lower() for name in distributions} & (names - requirements)
    ]
    environment = {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *missing], capture_output=True, text=True, env=environment
    )
    assert result.stdout == "bench gpu: this machine has no CUDA device\n", result.stderr[-2000:]
    assert result.returncode == 2


def test_report_counts_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = Report(match="crash", path=tmp_path / "figures.json")
    report.check("small", 1e-3, 1e-2)
    report.check("large", 2e-2, 1e-2)
    report.check("nan", float("nan"), 1.0)
    report.check_equal("equal", 3, 3)
    report.check_equal("unequal", 2, 3)
    report.part("a crash", {}.__getitem__, "x")
    report.part("not selected", report.check_equal, "equal", 2, 3)
    assert report.failures == ["large", "nan", "unequal", "a crash"]
    assert '"CRASH a crash"' in (tmp_path / "figures.json").read_text()
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == 0.2


def test_parts_run_once_and_in_time() -> None:
    report, calls = Report(max_seconds=100.0), list[str]()
    for name in ("a", "b", "a"):
        report.part(name, calls.append, name)
    report.start -= 101
    report.part("c", calls.append, "c")
    assert calls == ["a", "b"]
    assert list(report.values) == ["left out c"]


def test_all_is_every_part_in_the_order_of_value(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nanochat").mkdir()
    (tmp_path / "nanochat" / "gpt.py").touch()
    names: list[str] = []

    def part(report: Report, name: str, *_: object, **__: object) -> None:
        if report.match in name and name not in report.parts:
            report.parts.add(name)
            names.append(name)

    monkeypatch.setattr(Report, "part", part)
    monkeypatch.setattr(sys, "path", list(sys.path))
    args = gpu.Args(part="all", checkout=str(tmp_path))
    gpu.run_all(Report(), args)
    first = ["fused forward", "engine", "engine, batch-invariant"]
    assert names[:4] == [*first, "d12 × 32, full attention, ours, turn 0"]
    whole = Report()
    before, names[:] = set(names), []
    for kind in ("check", "train", "serve", "nanochat"):
        gpu.run_part(kind, whole, args)  # type: ignore[arg-type]
    assert before == set(names)
    names.clear()
    gpu.run_all(Report(), gpu.Args(part="all"))
    assert set(names) == {
        name for name in before if "nanochat" not in name and ", ours" not in name
    }


def test_all_takes_no_match() -> None:
    with pytest.raises(ValueError, match="match='d12' is not allowed: empty with part all"):
        gpu.Args(part="all", match="d12")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "check",
    [
        gpu_checks.check_forward,
        gpu_checks.check_engine,
        gpu_checks.check_batch_invariance,
        gpu_checks.check_sampler,
        gpu_checks.check_training,
        gpu_checks.check_fp8,
    ],
)
def test_gpu_computes_what_the_cpu_does(check: object) -> None:
    report = Report()
    check(report)  # type: ignore[operator]
    assert not report.failures


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", gpu_checks.MODELS)
def test_gradients_are_those_of_the_cpu(name: str) -> None:
    report = Report()
    config = gpu_checks.small_config(**gpu_checks.MODELS[name])
    gpu_checks.check_gradients(report, name, config)
    assert not report.failures
