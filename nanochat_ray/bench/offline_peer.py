"""One system of ``bench offline``: a program of its own, run by that system's own Python.

It imports neither nanochat_ray (unless it is that system) nor anything that the peers' environments
lack. Its first line, on what was standard output when it began, is {"about": text}. Each line on
standard input is a job, {"prompts": [[id]], "max_tokens": n, "temperature": t, "top_p": p}; the
answer is one line, {"seconds": s, "tokens": [[id]]}. No end-of-sequence token: every prompt gets
exactly n tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int, float, float], list[list[int]]]
"""Of prompts, max_tokens, temperature and top_p."""
TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def ours(folder: str, options: dict[str, Any]) -> tuple[Generate, str]:
    from pathlib import Path

    from nanochat_ray.checkpoint import hf
    from nanochat_ray.engine.config import EngineConfig
    from nanochat_ray.engine.engine import Engine
    from nanochat_ray.engine.request import Request, SamplingParams

    model, _ = hf.import_folder(Path(folder))
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    settings: dict[str, Any] = {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "prefill_chunk": 512,
        "max_queue_size": 4096,
        "prefix_cache_tokens": 0,
    }
    settings |= {key: value for key, value in options.items() if key in fields}
    engine = Engine(model, EngineConfig(**settings))

    def generate(
        prompts: list[list[int]], max_tokens: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        completions: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            completions[str(i)] = []
            params = SamplingParams(
                temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=i
            )
            engine.add(Request(id=str(i), prompt=prompt, params=params))
        while engine.has_work:
            for output in engine.step():
                completions[output.request_id] += output.tokens
        return list(completions.values())

    gc.collect()
    gc.freeze()  # as a server does, and as vLLM does by itself
    cache: Any = engine.runner.cache  # in slots
    about = f"kernels {engine.runner.kernels}, {engine.config.num_speculative_tokens} draft tokens"
    return generate, f"{about}, KV cache {str(cache.keys.dtype).removeprefix('torch.')}"


def vllm(folder: str, options: dict[str, Any]) -> tuple[Generate, str]:
    import vllm
    from vllm import LLM, SamplingParams

    dtype = TORCH_DTYPES[options.get("precision", "fp32")]
    llm = LLM(
        model=folder,
        dtype=dtype,
        max_num_seqs=64,
        enable_prefix_caching=bool(options.get("prefix_cache_tokens")),
        disable_log_stats=True,
    )

    def generate(
        prompts: list[list[int]], max_tokens: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=max_tokens, ignore_eos=True
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = llm.generate(inputs, params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    return generate, f"version {vllm.__version__}, no draft tokens, KV cache {dtype}"


def transformers(folder: str, options: dict[str, Any]) -> tuple[Generate, str]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads())
    dtype = TORCH_DTYPES[options.get("precision", "fp32")]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(
        prompts: list[list[int]], max_tokens: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        ids = torch.tensor(prompts)  # equal lengths, so that no padding is needed
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **sampling,
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
        )
        return out[:, ids.size(1) :].tolist()

    about = f"version {transformers.__version__}, no draft tokens, KV cache {dtype}"
    return generate, about


def llama_cpp(folder: str, options: dict[str, Any]) -> tuple[Generate, str]:
    """A llama of the same sizes: see ``llama_cpp_peer``."""
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "llama_cpp_peer.py")
    return runpy.run_path(file)["load"](folder, options.get("precision", "fp32"), threads())


SYSTEMS = {"nanochat_ray": ours, "vllm": vllm, "transformers": transformers, "llama.cpp": llama_cpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system", choices=sorted(SYSTEMS))
    parser.add_argument("folder")
    parser.add_argument("options", type=json.loads)
    args = parser.parse_args()
    sys.path.pop(0)  # this folder: its files are no modules of a peer's
    # Libraries print where they like: what they write goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generate, about = SYSTEMS[args.system](args.folder, args.options)
    print(json.dumps({"about": about}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.perf_counter()
        sampling = job.get("temperature", 0.0), job.get("top_p", 1.0)
        tokens = generate(job["prompts"], job["max_tokens"], *sampling)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers)


if __name__ == "__main__":
    main()
