"""Benchmarks: ``nanochat-ray bench NAME``, one file per program in ``nanochat_ray/bench/``."""

COMMANDS = {
    "offline": "decoding, by batch size, beside vLLM and transformers",
    "serve": "HTTP under load, beside other servers",
    "train": "the training step, two workers, Ray's share, the data loader",
    "learn": "tokens and seconds to AdamW's bits per byte, and ablations",
    "learning-rates": "the best factor on the learning rates at each batch size",
    "core": "CORE by our engine and by nanochat's own code, on equal weights",
    "gpu": "a GPU against the CPU: equal results; training and decoding speed",
    "overload": "more requests than a server can answer, and clients that hold it up",
    "rolls": "new checkpoints of a run rolled out under streams, sound ones and bad ones",
    "rollouts": "sampling for reinforcement learning, beside nanochat's",
    "rl-gain": "what reinforcement learning gives and unlearns, over seeds",
    "rl-step": "the parts of a step of reinforcement learning, and what rehearsal adds",
    "shared-fleet": "users of an endpoint whose replicas also sample rollouts",
    "scale": "what the driver and each rank hold and do for terabytes and 1,024 ranks",
    "replay": "broken requests beside steady streams: no stream may suffer",
}
"""Program → what it measures."""


def module_of(command: str) -> str:
    """Path of the module of a program."""
    return f"nanochat_ray.bench.{command.replace('-', '_')}"
