"""What ``load`` measures over HTTP, on the engine itself: the model and the same prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from nanochat_ray.bench.http_stream import Result
from nanochat_ray.bench.load import Prompt
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.loading import engine_from_run
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer


def make_run(run: Store) -> None:
    """A ``classic`` model of 14 M random weights, if the run is not there."""
    if checkpoint.latest(run) is not None:
        return
    # Every byte, then pairs: a vocabulary of the size of a real one.
    pairs = [bytes([a, b]) for a in range(32, 127) for b in range(32, 127)][: 4096 - 256 - 9]
    tokenizer = Tokenizer([*(bytes([b]) for b in range(256)), *pairs])
    config = ModelConfig.classic(
        vocab_size=tokenizer.vocab_size,
        n_layer=6,
        n_head=6,
        n_kv_head=6,
        n_embd=384,
        sequence_len=2048,
    )
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    checkpoint.save(
        run,
        0,
        model_config=config,
        weights=model.state_dict(),
        optimizer=None,
        trainer={"step": 0},
        tokenizer=tokenizer,
    )


def is_trained(run: Store) -> bool:
    """Whether the run has more than the random weights that it began with."""
    return checkpoint.load_trainer(run)["step"] > 0


def make_engine(run: Store, threads: int, config: EngineConfig) -> Engine:
    torch.set_num_threads(threads)
    engine, _ = engine_from_run(run, config)
    return engine


def drive(engine: Engine, prompts: Sequence[Prompt], concurrency: int) -> list[Result]:
    """The closed loop of ``load.drive``, with the engine stepped by hand. ``text`` are ids."""
    waiting = list(enumerate(prompts))[::-1]
    results: dict[str, Result] = {}
    last: dict[str, float] = {}
    running = 0
    while waiting or running:
        while waiting and running < concurrency:
            i, prompt = waiting.pop()
            params = SamplingParams(
                temperature=prompt.temperature,
                top_p=prompt.top_p,
                max_tokens=prompt.output,
                ignore_eos=True,
            )
            results[str(i)] = Result(time.perf_counter(), prompt_tokens=len(prompt.ids))
            engine.add(Request(id=str(i), prompt=prompt.ids, params=params))
            running += 1
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            result = results[output.request_id]
            result.tokens += len(output.tokens)
            result.text += "".join(f" {token}" for token in output.tokens)
            if output.request_id in last:
                result.gaps_s.append(now - last[output.request_id])
            else:
                result.first_s = now - result.began
            last[output.request_id] = now
            result.total_s = now - result.began
            running -= output.finish is not None
    return list(results.values())
