"""README's first command on a folder of text, at its smallest, from beginning to end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import psutil
import pytest

from tests.tiny import free_ports

REPO = Path(__file__).parents[1]


def script(name: str, home: Path, *flags: str, seconds: float) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment.update(
        NANOCHAT_VENV=sys.prefix, XDG_STATE_HOME=str(home), NANOCHAT_OBJECT_STORE="200000000"
    )
    return subprocess.run(
        ["bash", str(REPO / "cluster" / f"{name}.sh"), *flags],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=seconds,
        env=environment,
        check=False,
    )


def processes(port: int) -> list[int]:
    pids = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NANOCHAT_CLUSTER") == f"nanochat_ray-{port}":
                pids.append(process.pid)
        except psutil.Error:
            continue
    return pids


@pytest.mark.ray
@pytest.mark.timeout(800)
def test_from_a_folder_of_text_to_an_answer(tmp_path: Path) -> None:
    text, storage = tmp_path / "text", tmp_path / "storage"
    text.mkdir()
    for path in REPO.glob("nanochat_ray/*/*.py"):
        shutil.copy(path, text / f"{path.parent.name}-{path.stem}.txt")
    (port,) = free_ports(1)
    flags = ("--storage", str(storage), "--depth", "1", "--minutes", "0.1")
    flags += ("--port", str(port), "--leave")
    try:
        binary = tmp_path / "noise.txt"
        binary.write_bytes(os.urandom(5000))
        result = script("quickstart", tmp_path, *flags, "--text", str(binary), seconds=120)
        assert result.returncode != 0
        assert "noise.txt is" in result.stdout
        assert not processes(port)

        first = script("quickstart", tmp_path, *flags, "--text", str(text), seconds=480)
        assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-2000:]
        for message in (
            "bits per byte of held-out text",
            "chain_sum",
            "the chat page:",
            "Who are you?",
        ):
            assert message in first.stdout
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        (model,) = client.models.list().data
        assert model.id.startswith("chat-d1-")
        ask = [{"role": "user", "content": "Who are you?"}]
        stream = client.chat.completions.create(
            model=model.id, messages=ask, stream=True, temperature=0, max_tokens=40
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        again = script("quickstart", tmp_path, *flags, "--text", str(text), seconds=120)
        assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-2000:]
        assert "is trained already" in again.stdout
    finally:
        result = script("stop", tmp_path, "--port", str(port), seconds=60)
    assert result.returncode == 0
    assert not processes(port)
