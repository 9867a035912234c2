"""Files of tensors that are not what ``write_tensors`` writes: each is refused for its reason."""

from __future__ import annotations

import io
from typing import Any

import msgpack
import pytest
import torch

from nanochat_ray.checkpoint import codec
from nanochat_ray.checkpoint.codec import MAGIC, read_tensors, write_tensors

HEAD = {"format": MAGIC, "tensors": 1}
W = {"name": "w", "dtype": "float32", "shape": [2], "chunks": 1}
DATA = b"\0\0\x80\x3f\0\0\0\xc0"


def read(*values: Any, size: int = 8) -> dict[str, torch.Tensor]:
    stream = io.BytesIO(b"".join(map(msgpack.packb, values)))
    return read_tensors(stream, size)


def test_a_tensor_of_the_whole_size_is_read() -> None:
    assert read(HEAD, W, DATA)["w"].tolist() == [1.0, -2.0]
    scalar = {**W, "shape": [], "dtype": "uint8"}
    assert read(HEAD, scalar, b"\x07", size=1)["w"].item() == 7
    empty = {**W, "shape": [3, 0], "chunks": 0}
    assert read(HEAD, empty, size=0)["w"].shape == (3, 0)
    assert read({**HEAD, "tensors": 0}) == {}


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([5], "this is no file of tensors"),
        ([{**HEAD, "format": "other"}, W, DATA], "this is no file of tensors"),
        ([{"format": MAGIC}, W, DATA], "ends too early or is damaged"),
        ([{**HEAD, "tensors": None}, W, DATA], "the file is damaged"),
        ([HEAD], "ends too early"),
        ([HEAD, W], "ends too early"),
        ([HEAD, [1], DATA], "a tensor's header is damaged"),
        ([HEAD, {"name": "w"}, DATA], "a tensor's header is damaged"),
        ([HEAD, {**W, "more": 1}, DATA], "a tensor's header is damaged"),
        ([HEAD, {**W, "name": 5}, DATA], "tensor 5 has a dtype that is not known"),
        ([HEAD, {**W, "dtype": "int7"}, DATA], "dtype that is not known: 'int7'"),
        ([HEAD, {**W, "shape": 2}, DATA], "has the shape 2"),
        ([HEAD, {**W, "shape": [-2]}, DATA], r"has the shape \[-2\]"),
        ([HEAD, {**W, "shape": [2.0]}, DATA], r"has the shape \[2\.0\]"),
        ([HEAD, {**W, "chunks": 1.0}, DATA], "has the shape"),
        ([HEAD, {**W, "chunks": 2}, DATA], "does not fit into its file"),
        ([HEAD, {**W, "chunks": 0}], "does not fit into its file"),
        ([HEAD, {**W, "shape": [3]}, DATA + DATA[:4]], "does not fit into its file"),
        ([HEAD, W, DATA + b"x"], "chunk of the wrong size"),
        ([HEAD, W, b""], "chunk of the wrong size"),
        ([HEAD, W, "text"], "chunk of the wrong size"),
        ([HEAD, W, DATA[:4]], "has 4 of 8 bytes"),
    ],
)
def test_damage_is_named(values: list[Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read(*values)


def test_two_tensors_share_the_size() -> None:
    two, other = {**HEAD, "tensors": 2}, {**W, "name": "v"}
    assert set(read(two, W, DATA, other, DATA, size=16)) == {"w", "v"}
    with pytest.raises(ValueError, match=r"'v' of shape .* does not fit into its file"):
        read(two, W, DATA, other, DATA, size=15)
    with pytest.raises(ValueError, match="'w' comes twice"):
        read(two, W, DATA, W, DATA, size=16)


def test_large_tensors_have_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "CHUNK", 16)
    tensors = {"a": torch.arange(10), "b": torch.arange(4, dtype=torch.int32)}
    stream = io.BytesIO()
    write_tensors(stream, tensors)
    heads = list(msgpack.Unpacker(io.BytesIO(stream.getvalue())))
    sizes = [len(value) if isinstance(value, bytes) else value.get("chunks") for value in heads]
    assert sizes == [None, 5, 16, 16, 16, 16, 16, 1, 16]
    stream.seek(0)
    back = read_tensors(stream, 96)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
