"""Named tensors as a stream of MessagePack: readable anywhere, streamed, and never code.

A file is one header map, then for each tensor one map ``{name, dtype, shape, chunks}`` and that
many binary chunks of raw little-endian bytes, in C order. Memory beyond the tensors themselves is
one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import torch
from torch import Tensor

MAGIC = "nanochat_ray tensors 1"
CHUNK = 16 << 20
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_tensors(stream: Any, tensors: Mapping[str, Tensor]) -> None:
    """Writes ``tensors`` in order. ValueError for a dtype that has no name here."""
    pack = msgpack.Packer().pack
    stream.write(pack({"format": MAGIC, "tensors": len(tensors)}))
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(
                f"tensor {name}: {tensor.dtype} cannot be stored; {sorted(DTYPES)} can"
            )
        data = _bytes_of(tensor)
        chunks = -(-len(data) // CHUNK)
        head = {"name": name, "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}
        stream.write(pack({**head, "chunks": chunks}))
        for at in range(0, len(data), CHUNK):
            stream.write(pack(data[at : at + CHUNK]))


def _parse_head(head: Any, size: int) -> tuple[str, torch.dtype, tuple[int, ...], int]:
    """The checked header of one tensor; ``size`` is the most bytes that it can have."""
    if not isinstance(head, dict) or set(head) != {"name", "dtype", "shape", "chunks"}:
        raise ValueError("a tensor's header is damaged")
    name, dtype, shape, chunks = (head[k] for k in ("name", "dtype", "shape", "chunks"))
    if not isinstance(name, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has a dtype that is not known: {dtype!r}")
    is_shape = isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not is_shape or not isinstance(chunks, int):
        raise ValueError(f"tensor {name!r} has the shape {shape!r}")
    total = math.prod(shape) * DTYPES[dtype].itemsize
    if total > size or chunks != -(-total // CHUNK):
        raise ValueError(f"tensor {name!r} of shape {shape} does not fit into its file")
    return name, DTYPES[dtype], tuple(shape), chunks


def read_tensors(stream: Any, size: int) -> dict[str, Tensor]:
    """What ``write_tensors`` wrote, from a stream of ``size`` bytes, in host memory.

    Raises ValueError for anything else; no header makes it take more memory than ``size``.
    """
    unpacker = msgpack.Unpacker(
        stream, max_buffer_size=CHUNK + (1 << 20), read_size=1 << 20, strict_map_key=True
    )
    tensors: dict[str, Tensor] = {}
    try:
        head = unpacker.unpack()
        if not isinstance(head, dict) or head.get("format") != MAGIC:
            raise ValueError(f"this is no file of tensors ({MAGIC})")
        for _ in range(int(head["tensors"])):
            name, dtype, shape, chunks = _parse_head(unpacker.unpack(), size)
            if name in tensors:
                raise ValueError(f"tensor {name!r} comes twice")
            flat = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
            at = 0
            for _ in range(chunks):
                chunk = unpacker.unpack()
                if not isinstance(chunk, bytes) or at + len(chunk) > len(flat) or not chunk:
                    raise ValueError(f"tensor {name!r} has a chunk of the wrong size")
                flat[at : at + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
                at += len(chunk)
            if at != len(flat):
                raise ValueError(f"tensor {name!r} has {at} of {len(flat)} bytes")
            size -= at
            tensors[name] = flat.view(dtype).view(shape)
    except (msgpack.exceptions.UnpackException, msgpack.exceptions.ExtraData, KeyError) as error:
        raise ValueError(f"the file ends too early or is damaged ({error!r})") from None
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the file is damaged ({error})") from None
    return tensors
