"""Servers that modules of this folder share; ``engine`` is a fixture of each."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import serving

TOK = Tokenizer.bytes_only()


@pytest.fixture
def url(engine: ScriptedClient) -> Iterator[str]:
    with serving(build_app(engine, TOK, "tiny", 256)) as url:
        yield url


@pytest.fixture(scope="module")
def refusing_url() -> Iterator[str]:
    """Of a server for all refusals, none of which reaches its engine."""
    engine = ScriptedClient([65])
    with serving(build_app(engine, TOK, "tiny", 256)) as url:
        yield url
    assert not engine.requests


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
