"""A guest of an engine that serves samples what an engine of its own would; no Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.request import EngineStoppedError, SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray import rollout_engine
from nanochat_ray.on_ray.rollout_engine import GuestEngine
from nanochat_ray.rl.rollout import EngineGenerator, make_requests
from nanochat_ray.storage import Store
from tests.rl.tiny_rl import ENGINE, job, save_parent
from tests.tiny import TOKENIZER, tiny_config


def host() -> EngineLoop:
    model = GPT(tiny_config(n_layer=1))
    model.init_weights(torch.Generator().manual_seed(0))
    loop = EngineLoop(Engine.from_model(model, TOKENIZER, ENGINE), lambda outputs: None)
    loop.start()
    return loop


def test_guest_samples_with_the_weights_of_a_call(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_engine.ray, "get", lambda arrays: arrays)
    save_parent(root)
    config = job(root, "rl")
    model, _ = checkpoint.load_model(root.child("runs", "chat"))
    local = EngineGenerator.of_model(model, TOKENIZER, ENGINE)
    requests = make_requests([1, 2], range(12), SamplingParams(max_tokens=9, logprobs=0), "r")
    wires = [request.to_wire() for request in requests]

    async def run() -> None:
        loop, guest = host(), GuestEngine("cpu")
        version_of_host = loop.weight_version

        async def sample(version: int) -> list[Any]:
            arrays = {name: t.numpy().copy() for name, t in model.state_dict().items()}
            return await guest.generate(loop, config, ENGINE, version, [arrays], wires)

        for version in (3, 4):
            local.load(version, model.state_dict())
            reference = [rollout.to_wire() for rollout in local.generate(requests)]
            assert await sample(version) == reference
            assert {rollout[-1] for rollout in reference} == {version}
            for weight in model.state_dict().values():
                weight.mul_(1.1)
        assert loop.weight_version == version_of_host
        loop.stop()
        with pytest.raises(EngineStoppedError):
            await sample(5)
        guest.leave()
        assert not guest.is_here

    asyncio.run(run())
