"""The generator of damage: every kind occurs, the same seed gives the same, nothing is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.damage import KINDS, HangError, check_damage, damaged_copies


def a_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "thing"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"n": 1, "list": [1, 2, 3], "deep": {"s": "x"}}))
    (folder / "b.bin").write_bytes(bytes(range(100)))
    return folder


def test_damage_depends_on_the_seed_alone(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)

    def descriptions(seed: int) -> list[str]:
        return [description for description, _ in damaged_copies(folder, 50, seed)]

    assert descriptions(0) == descriptions(0) != descriptions(1)
    paths = []
    for _, path in damaged_copies(folder, 2 * len(KINDS), 0):
        assert path.is_dir()
        paths.append(path)
    assert not any(path.exists() for path in paths)
    assert json.loads((folder / "a.json").read_text())["n"] == 1


def test_check_damage_tells_the_outcomes_apart(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)

    def refuse(path: Path) -> int:
        raise ValueError(f"{path}/a.json is damaged")

    assert check_damage(folder, refuse, same=bool, count=30, seed=0) == {"refused": 30}
    assert check_damage(folder, lambda path: 1, same=bool, count=9, seed=0) == {"same": 9}
    with pytest.raises(AssertionError, match="loads as something else"):
        check_damage(folder, lambda path: 0, same=bool, count=1, seed=0)

    def crash(path: Path) -> int:
        raise KeyError("n")

    with pytest.raises(AssertionError, match="KeyError"):
        check_damage(folder, crash, same=bool, count=1, seed=0)

    def hang(path: Path) -> int:
        while True:
            pass

    with pytest.raises(HangError):
        check_damage(folder, hang, same=bool, count=1, seed=0, limit=0.05)
