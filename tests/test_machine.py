"""What a process takes of its machine."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import psutil
import pytest
import torch

from nanochat_ray import container, machine
from tests.waiting import wait_for


@pytest.mark.parametrize(
    ("limit", "want"),
    [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8)],
)
def test_cores_are_the_containers(
    limit: str, want: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert container.cores(tmp_path) == want
    assert container.cores(tmp_path / "none") == 8


@pytest.mark.parametrize(
    ("cores", "engines", "want"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 3), (9, 2, 4), (8, 9, 1), (64, 1, 8)],
)
def test_an_engine_leaves_a_core(
    cores: int, engines: int, want: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(container, "cores", lambda: cores)
    assert machine.engine_threads(engines) == want


def test_loading_leaves_no_threads() -> None:
    process, before = psutil.Process(), torch.get_num_threads()

    def load() -> int:
        num_before = process.num_threads()
        torch.set_num_threads(3)
        torch.ones(2_000_000).add_(1)
        return process.num_threads() - num_before

    had = process.num_threads()
    try:
        assert machine.run_in_temporary_thread(load) > 0
        wait_for(lambda: process.num_threads() <= had, 60, "the team's end")
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ZeroDivisionError):
        machine.run_in_temporary_thread(lambda: 1 // 0)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_loading_leaves_no_freed_memory() -> None:
    process = psutil.Process()

    def load() -> tuple[list[bytes], int]:
        blocks = [b"x" * 100_000 for _ in range(1000)]
        return blocks[::20], process.memory_info().rss

    blocks, most = machine.run_in_temporary_thread(load)
    assert len(blocks) == 50
    assert most - process.memory_info().rss > 50_000_000  # of 95 MB that were freed


@pytest.mark.parametrize("shape", [(3, 5), (7, 1024, 513)])  # smaller than a huge page, and larger
def test_zeros_are_those_of_torch(shape: tuple[int, ...]) -> None:
    zeros = machine.zeros(shape, torch.bfloat16, torch.device("cpu"))
    assert zeros.is_contiguous()
    assert torch.equal(zeros, torch.zeros(shape, dtype=torch.bfloat16))
    zeros += 1
    assert not machine.zeros(shape, torch.bfloat16, torch.device("cpu")).any()


def test_zeros_on_a_system_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.mmap, "MADV_HUGEPAGE", 10_000, raising=False)
    assert not machine.zeros((1 << 20,), torch.float32, torch.device("cpu")).any()


def test_engines_share_a_gpu_by_their_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first engine has 30 of its 40 GiB; the second has the same 40, not the rest of a rest."""
    gib, gpu = 1 << 30, torch.device("cuda")

    def free(driver: int, torch_memory: int, tensors: int, share: float) -> int:
        numbers = {"mem_get_info": (driver * gib, 80 * gib)}
        numbers |= {"memory_reserved": torch_memory * gib, "memory_allocated": tensors * gib}
        for name, number in numbers.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, number=number: number)
        return machine.free_memory(gpu, gpu_share=share) // gib

    assert free(79, 0, 0, 0.5) == 40
    assert free(79 - 30, 0, 0, 0.5) == 40
    assert free(79 - 50, 0, 0, 0.5) == 29, "another process took more than its share"
    assert free(40, 32, 2, 1.0) == 70, "what torch has cached is free"
    assert free(30, 40, 40, 0.5) == 0


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_allocator_settings_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv(name, "garbage_collection_threshold:0.8")
        before = dict(os.environ)
        machine.use_expandable_segments()
        assert dict(os.environ) == before
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    machine.use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
