"""Clients that others wrote, unmodified, each in an environment of its own.

NANOCHAT_CLIENTS   a Python with langchain-openai and litellm
NANOCHAT_NODE      a folder in which ``npm install openai`` was run
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_ray.engine.request import Request
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.client import OutputStream
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import serving

HERE = Path(__file__).parent / "clients"
TOK = Tokenizer.bytes_only()
START, END = TOK.special("<|python_start|>"), TOK.special("<|python_end|>")


class Caller(ScriptedClient):
    """Calls the calculator when it is asked to, else greets."""

    async def submit(self, request: Request, stream: OutputStream) -> None:
        queries = TOK.decode(request.prompt).endswith("call<|user_end|><|assistant_start|>")
        call = [START, *TOK.encode("12+7"), END]
        self.tokens = call if queries else TOK.encode("Grüße 🙂")
        await super().submit(request, stream)


@pytest.fixture
def url() -> Iterator[str]:
    with serving(build_app(Caller([]), TOK, "tiny", 256)) as url:
        yield url


def run(*command: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip().endswith("ok")


@pytest.mark.parametrize("client", ["langchain_client.py", "litellm_client.py"])
def test_python_clients(url: str, client: str) -> None:
    python = os.environ.get("NANOCHAT_CLIENTS")
    if not python:
        pytest.skip("NANOCHAT_CLIENTS names no Python")
    run(python, str(HERE / client), url)


def test_node_client(url: str) -> None:
    folder = os.environ.get("NANOCHAT_NODE")
    if not folder:
        pytest.skip("NANOCHAT_NODE names no folder")
    run("node", str(HERE / "openai_client.mjs"), url, folder)
