"""Commands, links and figures of the READMEs and of what was measured hold."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray import cli
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.cli import bench, entry
from nanochat_ray.storage import Store
from nanochat_ray.tasks.registry import make_task
from nanochat_ray.tasks.task import grade_answer
from tests.rl.tiny_rl import save_parent
from tests.tiny import write_dataset

REPO = Path(__file__).parent.parent
READMES = sorted([*REPO.glob("*.md"), *REPO.glob("k8s/*.md"), *REPO.glob("nanochat_ray/**/*.md")])
TEXT = {path: path.read_text() for path in READMES}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each line in the shell blocks, without comments."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


COMMANDS = [
    pytest.param(words, id=f"{path.parent.name}-{' '.join(words)[:60]}")
    for path in READMES
    for words in commands(TEXT[path])
]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_a_readme_is_valid(words: list[str]) -> None:
    """Its flags are parsed and checked; a script exists and knows its flags."""
    while re.match(r"[A-Z_]+=", words[0]):
        if not (words := words[1:]):
            return  # an assignment alone
    program, *arguments = words
    if program == "python" and arguments[0].startswith("jobs/"):
        program, arguments = "nanochat-ray", [Path(arguments[0]).stem, *arguments[1:]]
    if program == "nanochat-ray":
        name, *flags = arguments
        if name == "bench":
            module = importlib.import_module(bench.module_of(flags[0]))
            entry.parse(module.Args, None, flags[1:])
            return
        module = importlib.import_module(cli.module_of(name))
        entry.parse(module.Args, None, flags)
    elif program == "bash":
        script, *flags = arguments
        text = (REPO / script).read_text()
        if command := re.search(r"-m nanochat_ray (\w+)", text):
            module = importlib.import_module(cli.module_of(command[1]))
            entry.parse(module.Args, None, flags)
            return
        for flag in (word for word in flags if word.startswith("--")):
            assert flag in text or script == "cluster/check.sh"  # which passes them to pytest
    else:
        programs = (
            "serve",
            "kubectl",
            "ray",
            "pip",
            "python",
            "pytest",
            "torchrun",
            "eval",
            "docker",
        )
        assert program in programs
        if program == "kubectl" and "-k" in arguments:
            assert (REPO / arguments[arguments.index("-k") + 1] / "kustomization.yaml").exists()


@pytest.mark.parametrize("path", READMES, ids=[str(p.relative_to(REPO)) for p in READMES])
def test_links_of_a_readme_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT[path]):
        assert (path.parent / target).exists(), target


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", READMES, ids=[str(p.relative_to(REPO)) for p in READMES])
def test_headings_that_links_name_exist(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*\.md|)#([^)]+)\)", TEXT[path]):
        page = TEXT[(path.parent / target).resolve()] if target else TEXT[path]
        assert anchor in anchors(page), f"{target}#{anchor}"


def python_blocks(room: str) -> list[str]:
    text = TEXT[REPO / "nanochat_ray" / room / "README.md"]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_python_of_training_runs(root: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """What it trains is smaller here."""
    write_dataset(root, "base")
    names: dict[str, Any] = {}
    for block in python_blocks("train"):
        code = block.replace("/data", root.uri).replace("tokens=1_000_000", "tokens=2_000")
        exec(code.replace("model_config(4,", "model_config(1,"), names)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("0.5 ", "1.0 ")) for line in lines) == 2
    assert checkpoint.latest(root.child("runs", "ablated")) == "step-000000"


@pytest.mark.slow
def test_the_readmes_own_task_is_learned(
    root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task_code, code = python_blocks("rl")
    (tmp_path / "my_tasks.py").write_text(task_code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the whole process
    task = make_task("my_tasks.Doubles", "val", 2)
    assert grade_answer(task, 1, task.example(1)[-1]["content"]) == 1
    assert grade_answer(task, 1, "1") == 0
    save_parent(root)
    small = {"questions": 2, "samples": 2, "max_rounds": 1, "max_tokens": 4, "eval_questions": 2}
    code = code.replace('parent="chat"', f"storage={root.uri!r}, parent='chat'")
    exec(code.replace("steps=60", "steps=1").replace('{"questions": 24}', repr(small)), {})
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    assert checkpoint.latest(root.child("runs", "rl")) == "step-000001"


def test_the_readme_stays_short() -> None:
    assert len(TEXT[REPO / "README.md"].splitlines()) <= 150


def test_scripts_are_valid_shell() -> None:
    for script in (REPO / "cluster").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
