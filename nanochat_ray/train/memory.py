"""The memory of a worker, estimated before the run: what does not fit is refused, not killed.

The count follows what the code holds at its two peaks, the end of a forward pass and the update
of the largest group; tests/train/test_memory.py compares it with measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nanochat_ray.model.config import ModelConfig, count_parameters, has_value_embedding
from nanochat_ray.train.config import TrainConfig

GIB = 1 << 30
CPU_RUNTIME, CUDA_RUNTIME = int(0.45 * GIB), int(1.0 * GIB)
"""Python with torch (0.32 GiB after a step of a tiny model) and the scratch of its matmuls
(measured); a CUDA context with cuBLAS's workspaces."""
FRAGMENTED, GPU_FRAGMENTED = 1.12, 1.05
"""Activations come and go in many sizes, and an allocator leaves gaps. The first is measured on a
CPU; the second is that of torch's allocator for CUDA (train/BENCHMARKS.md)."""
MARGIN = 0.92
"""Share of the free memory that an estimate may fill: allocators fragment, counts are not exact."""


class DoesNotFitError(ValueError):
    """A run needs more memory than a worker has. The message says what would fit."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one worker, by what they are for. ``activations`` and ``update`` never coincide."""

    runtime: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    update: int
    checkpoint: int
    """Copies that a checkpoint is written from; in host memory if the model is on a GPU."""

    @property
    def total(self) -> int:
        """The peak."""
        lasting = self.runtime + self.weights + self.gradients + self.optimizer + self.checkpoint
        return lasting + max(self.activations + self.logits, self.update)


def estimate(
    model: ModelConfig, train: TrainConfig, *, world: int, on_gpu: bool, rank: int = 0
) -> Memory:
    """Peak memory of a worker of ``world``; rank 0, which writes checkpoints, has the most."""
    counts = count_parameters(model)
    size = 2 if train.precision == "bf16" else 4
    share = -(-counts.total // world)
    matrices = -(-counts.matrices // world)
    # Muon keeps a momentum (and a vector for each matrix), AdamW two moments.
    state = 4 * (matrices + 2 * -(-(counts.total - counts.matrices) // world))
    whole_state = 4 * (counts.matrices + 2 * (counts.total - counts.matrices))
    copies = 0 if on_gpu else whole_state + (4 * counts.total if rank == 0 else 0)
    return Memory(
        runtime=CUDA_RUNTIME if on_gpu else CPU_RUNTIME,
        weights=4 * counts.total,
        gradients=4 * counts.total,
        optimizer=state,
        activations=_activations(model, train, size, on_gpu),
        logits=_logits(model, train, size, on_gpu),
        update=_update(model, world, size) + (0 if world == 1 or on_gpu else 4 * share),
        checkpoint=copies,
    )


def _activations(model: ModelConfig, train: TrainConfig, size: int, on_gpu: bool) -> int:
    """What a forward pass keeps for its backward, and the temporaries of one layer."""
    tokens = train.micro_batch_size * model.sequence_len
    c, kv = model.n_embd, model.n_kv_head * model.head_dim
    # A block keeps its input, the normed input, q, k, v, the attention's output and its head
    # layout, the second normed input, and the hidden layer before and after its square.
    block = 5 * c + 2 * kv + 8 * c + c * model.residual_scalars
    gate = 2 * kv * model.value_embeds // 2  # value embeddings: in every other layer
    # Temporaries of the current block: its hidden layer's gradients beside their inputs.
    working = 12 * c
    if on_gpu:
        # Sums keep no input there, and attention needs no second layout of its output.
        block, gate, working = block - 2 * c, gate // 2, 20 * c
    if train.checkpoint_activations:
        channels = model.n_layer * c + block + 2 * gate + working
    else:
        channels = model.n_layer * (block + gate) + working
    channels += 6 * c  # embedding, smear, backout, the last norm and its gradient
    # Matrices are cast to the compute dtype where they are used, and kept for the backward.
    counts = count_parameters(model)
    cast = counts.matrices if size < 4 else 0
    if train.checkpoint_activations:
        cast //= model.n_layer
    # Gradients of one embedding table, dense, before they are added up.
    table = 4 * model.padded_vocab_size * c
    gaps = GPU_FRAGMENTED if on_gpu else FRAGMENTED
    return int(gaps * size * tokens * channels) + size * cast + table


def _logits(model: ModelConfig, train: TrainConfig, size: int, on_gpu: bool) -> int:
    """The chunk of logits with its gradient, and the head's own copies (model/loss.py)."""
    tokens = train.micro_batch_size * model.sequence_len
    chunk = (1 << 13) if on_gpu else max(16, (1 << 20) // model.vocab_size)
    head = model.padded_vocab_size * model.n_embd
    # On a GPU the gradient takes the place of the logits. Elsewhere: logits, their tanh or
    # exponential and one temporary in float32; the gradient in both.
    bytes_per_logit = size if on_gpu else 12 + size
    return min(tokens, chunk) * model.vocab_size * bytes_per_logit + (4 + size) * head


def _update(model: ModelConfig, world: int, size: int) -> int:
    """Muon on its largest stack of matrices, or AdamW on its largest table, whichever is more."""
    c, n = model.n_embd, model.n_layer
    kv = model.n_kv_head * model.head_dim
    # Matrices of one shape are one stack: those of the MLP's first half have as many elements as
    # all four of the attention.
    stack = 4 * n * c * c
    table = model.padded_vocab_size * max(
        c, kv * model.value_embeds * sum(has_value_embedding(i, n) for i in range(n))
    )
    # Nesterov's gradient, the iterate twice with its powers, the float32 update and its square.
    return max(-(-stack // world) * (12 + 4 * size), -(-table // world) * 8)


def check_memory(
    model: ModelConfig, train: TrainConfig, *, world: int, on_gpu: bool, free: int
) -> Memory:
    """The estimate, if it fits into ``free`` bytes. DoesNotFitError says what would instead."""
    peak = estimate(model, train, world=world, on_gpu=on_gpu)
    if peak.total <= MARGIN * free:
        return peak

    def fits(world: int, **changes: object) -> bool:
        variant = replace(train, **changes)  # type: ignore[arg-type]
        return estimate(model, variant, world=world, on_gpu=on_gpu).total <= MARGIN * free

    ways = []
    smaller = (
        n for n in range(train.micro_batch_size - 1, 0, -1) if train.global_batch_size % n == 0
    )
    smaller_micro = next((n for n in smaller if fits(world, micro_batch_size=n)), 0)
    if smaller_micro:
        ways.append(f"micro_batch_size={smaller_micro}")
    if not train.checkpoint_activations:
        if fits(world, checkpoint_activations=True):
            ways.append("checkpoint_activations")
        elif not smaller_micro and fits(world, micro_batch_size=1, checkpoint_activations=True):
            ways.append("checkpoint_activations with micro_batch_size=1")
    if on_gpu:  # on one machine more workers would only divide the same memory
        more = next((n for n in (2, 4, 8, 16, 32, 64) if n > world and fits(n)), 0)
        if more:
            ways.append(f"workers={more}")
    advice = f"what would fit: {' or '.join(ways)}" if ways else "a smaller depth would fit"
    raise DoesNotFitError(
        f"micro_batch_size={train.micro_batch_size} needs about {peak.total / GIB:.1f} GiB "
        f"on each of {world} worker{'s' * (world > 1)}, where {free / GIB:.1f} GiB are free: "
        f"{advice}"
    )
