"""llama.cpp as a system of ``bench offline``, with the packages llama-cpp-python and gguf.

llama.cpp has no NanoChat model, so it runs a llama of the same sizes with random weights: the same
layers, heads, width, vocabulary and number of parameters (its MLP has three matrices instead of
two, so it is 8/3 widths wide instead of 4). Its speed does not depend on the values.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}
"""Our precisions, and gguf's names of the same formats."""
BLOCK = 32
"""Inputs of a block of Q8_0."""
MAX_BATCH_TOKENS = 2048
"""llama.cpp's default of ``llama_decode``'s tokens."""
Generate = Callable[[list[list[int]], int, float, float], list[list[int]]]


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a llama that is as large as the model of ``config``."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    head = width // config["num_attention_heads"]
    kv_width = head * config["num_key_value_heads"]
    mlp = _mlp_width(config)
    yield "token_embd.weight", (vocab, width)
    yield "output_norm.weight", (width,)
    yield "output.weight", (vocab, width)
    for i in range(config["num_hidden_layers"]):
        yield f"blk.{i}.attn_norm.weight", (width,)
        yield f"blk.{i}.attn_q.weight", (width, width)
        yield f"blk.{i}.attn_k.weight", (kv_width, width)
        yield f"blk.{i}.attn_v.weight", (kv_width, width)
        yield f"blk.{i}.attn_output.weight", (width, width)
        yield f"blk.{i}.ffn_norm.weight", (width,)
        yield f"blk.{i}.ffn_gate.weight", (mlp, width)
        yield f"blk.{i}.ffn_up.weight", (mlp, width)
        yield f"blk.{i}.ffn_down.weight", (width, mlp)


def _mlp_width(config: dict[str, Any]) -> int:
    return round(2 * config["intermediate_size"] / 3 / BLOCK) * BLOCK


def write_gguf(path: Path, config: dict[str, Any], precision: str) -> None:
    """Writes a llama of the sizes in ``config``, a Hugging Face config.json; norms are float32."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    heads = config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(_mlp_width(config))
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    rng = np.random.default_rng(0)
    matrix_type = gguf.GGMLQuantizationType[TYPES[precision]]
    for name, shape in _tensors(config):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        values = rng.standard_normal(shape, np.float32) / shape[1] ** 0.5
        data = gguf.quants.quantize(values, matrix_type)
        writer.add_tensor(name, data, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """Prompts and decodes in batches, each sequence with a sampler of its own."""

    def __init__(self, path: Path, threads: int, repacks: bool):
        """``repacks``: whether llama.cpp may store weights in a layout of its own (AMX, REPACK)."""
        import llama_cpp

        self._lib: Any = llama_cpp
        self._threads = threads
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = repacks
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._batch = llama_cpp.llama_batch_init(MAX_BATCH_TOKENS, 0, 1)
        self._contexts: dict[tuple[int, int], Any] = {}

    def _context(self, sequences: int, length: int) -> Any:
        key = sequences, -(-length // 256) * 256
        if key not in self._contexts:
            params = self._lib.llama_context_default_params()
            params.n_ctx, params.n_seq_max = key[0] * key[1], sequences
            params.n_batch = MAX_BATCH_TOKENS
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[key] = self._lib.llama_init_from_model(self._model, params)
        return self._contexts[key]

    def _sampler(self, temperature: float, top_p: float, seed: int) -> Any:
        lib = self._lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if temperature:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(temperature))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(top_p, 1))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(seed))
        else:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
        return chain

    def generate(
        self, prompts: list[list[int]], max_tokens: int, temperature: float, top_p: float
    ) -> list[list[int]]:
        lib = self._lib
        context = self._context(len(prompts), max(map(len, prompts)) + max_tokens)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        samplers = [self._sampler(temperature, top_p, i) for i in range(len(prompts))]
        answers: list[list[int]] = [[] for _ in prompts]
        inputs = [
            (token, position, i, position == len(prompt) - 1)
            for i, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for step in range(max_tokens):
            for start in range(0, len(inputs), MAX_BATCH_TOKENS):
                self._decode(context, inputs[start : start + MAX_BATCH_TOKENS], samplers, answers)
            inputs = [
                (answers[i][-1], len(prompt) + step, i, True) for i, prompt in enumerate(prompts)
            ]
        for sampler in samplers:
            lib.llama_sampler_free(sampler)
        return answers

    def _decode(
        self,
        context: Any,
        inputs: list[tuple[int, int, int, bool]],
        samplers: list[Any],
        answers: list[list[int]],
    ) -> None:
        """Computes inputs (token, position, sequence, whether it samples); appends the samples."""
        batch = self._batch
        batch.n_tokens = len(inputs)
        for n, (token, position, sequence, samples) in enumerate(inputs):
            batch.token[n], batch.pos[n] = token, position
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
            batch.logits[n] = samples
        if status := self._lib.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed with {status}")
        for n, (_, _, sequence, samples) in enumerate(inputs):
            if samples:
                token = self._lib.llama_sampler_sample(samplers[sequence], context, n)
                answers[sequence].append(token)


def load(folder: str, precision: str, threads: int) -> tuple[Generate, str]:
    """What generates tokens, and its description, for the sizes of a Hugging Face folder."""
    import llama_cpp

    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    system = " ".join(llama_cpp.llama_print_system_info().decode().split())
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "model.gguf"
        write_gguf(path, config, precision)
        # Of llama-cpp-python 0.3.36, Q8_0 in the layout for AMX ends with a segmentation fault.
        repacks = precision != "int8" or "AMX_INT8 = 1" not in system
        llama = Llama(path, threads, repacks)
    layout = "its own weight layouts" if repacks else "no own weight layouts"
    about = f"llama-cpp-python {llama_cpp.__version__}, {TYPES[precision]}, {layout}"
    return llama.generate, f"{about}, no draft tokens, KV cache float16, {system}"
