"""Every Triton kernel compiles for an H100 (sm_90), with the real compiler and without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from nanochat_ray.engine import triton_attention, triton_fused, triton_matmul
from nanochat_ray.engine import triton_operators, triton_sampler
from nanochat_ray.model import triton_embedding, triton_loss, triton_rotary

def check(kernel, pointers, constants, num_warps=4):
    "Scalars are int32 or, by name, float32."
    floats = {"cap", "eps", "scale", "q_scale"}
    kinds = {n: "fp32" if n in floats else "i32" for n in kernel.arg_names}
    kinds |= {f"{name}_ptr": f"*{dtype}" for name, dtype in pointers.items()}
    kinds |= dict.fromkeys(constants, "constexpr")
    where = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=where)
    result = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    assert result.asm["cubin"], kernel.__name__

flags = {"HAS_CAP": True, "IS_BOUNDED": True, "HAS_GRAD": True, "BLOCK": 1024}
logits = {"logits": "bf16", "targets": "i64", "loss": "fp32"}
check(triton_loss._softcap_loss_kernel, logits, flags)
sums = {"grad": "bf16", "tokens": "i64", "starts": "i64", "chunks": "fp32", "out": "fp32"}
tiles = {"CHUNK": 128, "BLOCK_N": 8, "BLOCK_C": 256}
check(triton_embedding._sum_by_token_kernel, sums, tiles, num_warps=1)
sums = {"grad": "bf16", "tokens": "i64", "ids": "i64", "out": "fp32"}
check(triton_embedding._sum_chunk_kernel, sums, tiles, num_warps=1)
rows = {"table": "fp32", "ids": "i64", "out": "bf16"}
check(triton_embedding._gather_kernel, rows, {"BLOCK": 1024})
rotary = dict.fromkeys(("qkv", "cos", "sin", "q", "k"), "bf16") | {"scale": "fp32"}
sizes = {"H": 6, "HKV": 6, "HALF": 64, "BLOCK_H": 16, "BLOCK_D": 64}
check(triton_rotary._rotary_norm_kernel, rotary, sizes)
rotary = dict.fromkeys("dq dk dv q k cos sin out".split(), "bf16") | {"scale": "fp32"}
check(triton_rotary._rotary_norm_grad_kernel, rotary, sizes | {"BLOCK_KV": 8})
shape = {"G": 4, "D": 128, "BLOCK_D": 128}
data = {name: "bf16" for name in ("q", "k", "v", "out")} 
data |= {"sums": "fp32", "tops": "fp32"}
data |= {name: "i32" for name in ("tiles", "block_table")}
for split, block_m, block_n in ((128, 16, 64), (0, 64, 64)):
    tile = {"BLOCK_SIZE": 16, "BLOCK_M": block_m, "BLOCK_N": block_n}
    check(triton_attention._attention_kernel, data, shape | tile | {"SPLIT": split})
merge = {"sums": "fp32", "tops": "fp32", "out": "bf16", "tiles": "i32"}
splits = {"D": 128, "BLOCK_D": 128, "SPLIT": 128, "MERGE": 16}
check(triton_attention._merge_kernel, merge, splits)
columns = {"logits": "fp32", "tokens": "i64", "temperature": "fp32", "top_k": "i64"}
columns |= {"top_p": "fp64", "min_p": "fp32", "seed": "i64", "position": "i64", "slots": "i64"}
check(triton_sampler._sample_kernel, columns, {"INVALID_TOKEN": -1, "BLOCK": 4096}, num_warps=4)
check(triton_operators._rms_norm_kernel, {"x": "bf16", "out": "bf16"}, {"BLOCK": 1024})
rotary = dict.fromkeys(("x", "cos", "sin", "out"), "bf16")
check(triton_operators._rotary_qk_norm_kernel, rotary, {"HALF": 64, "BLOCK": 64})
check(triton_operators._relu_squared_kernel, {"x": "bf16"}, {"BLOCK": 1024})
check(triton_operators._softcap_kernel, {"x": "bf16", "out": "fp32"}, {"BLOCK": 1024})
pages = dict.fromkeys(("k", "v", "keys", "values"), "bf16") | {"slot_mapping": "i64"}
check(triton_operators._store_kv_kernel, pages, {"BLOCK": 512})
names = "table gate factor out x y x0 scale scale_0 skip middle backout sum norm qkv cos sin q"
fused = dict.fromkeys((names + " keys values").split(), "bf16")
fused |= dict.fromkeys(("ids", "previous", "positions", "slots"), "i64")
def pointers(kernel):
    return {n[:-4]: fused[n[:-4]] for n in kernel.arg_names if n.endswith("_ptr")}
smear = {"HAS_SMEAR": True, "BLOCK": 1024}
check(triton_fused._embed_kernel, pointers(triton_fused._embed_kernel), smear)
mix = {"HAS_Y": True, "HAS_SCALES": True, "SKIP": 1, "BACKOUT": 1, "KEEPS": True, "BLOCK": 1024}
check(triton_fused._residual_norm_kernel, pointers(triton_fused._residual_norm_kernel), mix)
heads = {"HAS_VALUES": True, "HALF": 64, "BLOCK": 64, "BLOCK_K": 16, "BLOCK_H": 16, "BLOCK_KV": 8}
check(triton_fused._qkv_kernel, pointers(triton_fused._qkv_kernel), heads)
few = {"K": 768, "BLOCK_N": 16, "BLOCK_K": 256}
check(triton_matmul._multiply_few_kernel, dict.fromkeys(("x", "weight", "out"), "bf16"), few)
tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
check(triton_matmul._matmul_kernel, dict.fromkeys(("x", "weight", "out"), "bf16"), tiles)
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_sm_90(tmp_path: object) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment
    )
    assert result.stdout == "compiled\n", result.stderr[-2000:]
