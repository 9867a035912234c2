"""A tiny policy, a task that it can learn in a few steps, and a run of both."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from nanochat_ray import config as configs
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.request import Finish, Request, RequestOutput, TokenLogprob
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.parent import describe, load_tokenizer
from nanochat_ray.rl.source import RolloutSource
from nanochat_ray.storage import Store
from nanochat_ray.tasks.task import Split
from nanochat_ray.text.chat import Message
from nanochat_ray.train import preflight
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from nanochat_ray.train.trainer import Trainer
from tests.tiny import save_model, tiny_config, write_dataset
from tests.train.run_trainer import FunctionHooks

TASK = "tests.rl.tiny_rl.EvenFirst"
POLICY = tiny_config(sequence_len=48, n_head=2, n_kv_head=1)
"""Its heads of 16 let the kernels of C compute it, whose logits do not depend on the batch."""
ENGINE = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64)
RL = RLConfig(
    tasks=(TASK,),
    pool=12,
    questions=4,
    samples=6,
    min_groups=2,
    max_tokens=4,
    truncation="grade",
    eval_questions=2,
    eval_samples=3,
)
TRAIN = TrainConfig(
    stage="rl",
    steps=4,
    global_batch_size=96,
    micro_batch_size=4,
    save_every=2,
    optim=OptimConfig(matrix_lr=0.01, embedding_lr=0.05, unembedding_lr=0.01, scalar_lr=0.01),
)


class EvenFirst:
    """Right is an answer whose first character has an even code."""

    def __init__(self, split: Split, size: int | None, seed: int, *, extra: str = ""):
        self.name, self.size, self.text = TASK, size or 20, f"{split[:2]}{extra}"

    def __len__(self) -> int:
        return self.size

    def question(self, index: int) -> list[Message]:
        return [{"role": "user", "content": f"{self.text} {index}"}]

    def example(self, index: int) -> list[Message]:
        return [*self.question(index), {"role": "assistant", "content": "B"}]

    def grade(self, index: int, answer: str) -> bool:
        return answer != "" and ord(answer[0]) % 2 == 0


class FakeEngine:
    """``OfflineEngine`` whose answers are known: tokens, log-probabilities, finish."""

    config, max_model_len, device_type = ENGINE, 48, "cpu"

    def __init__(self, answer: Callable[[int, Request], tuple[list[int], list[Any], Finish]]):
        """``answer``: of the number of a request and the request."""
        self.answer = answer
        self.requests: list[Request] = []
        self.versions: list[int] = []

    def load(self, version: int, weights: Any) -> None:
        self.versions.append(version)

    def run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        self.requests = list(requests)
        for number, request in reversed(list(enumerate(self.requests))):  # in any order
            tokens, logprobs, finish = self.answer(number, request)
            yield RequestOutput(
                request_id=request.id,
                tokens=tokens,
                finish=finish,
                logprobs=[None if x is None else TokenLogprob(logprob=x, top=[]) for x in logprobs],
                weight_version=str(self.versions[-1]),
            )


def save_parent(root: Store) -> None:
    """A random policy as run "chat", fine-tuned on the conversations "talk"."""
    model = GPT(POLICY)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    write_dataset(root, "talk", "sft")
    tuning = configs.to_json(dataclasses.replace(TRAIN, stage="sft"))
    about = {"dataset": "talk"}
    save_model(root.child("runs", "chat"), 1, model, train_config=tuning, about=about)


def job(root: Store, run: str, train: TrainConfig = TRAIN, rl: RLConfig = RL) -> TrainerConfig:
    model = checkpoint.load_config(root.child("runs", "chat")).model
    config = TrainerConfig(
        storage=root.uri, dataset="", run=run, model=model, train=train, parent="chat"
    )
    return preflight.check_run(config, load_tokenizer(config), describe(config, rl))


def run_rl(
    root: Store,
    run: str,
    *,
    steps: int | None = None,
    rl: RLConfig = RL,
    engine: EngineConfig = ENGINE,
    stop_after: int = 0,
    make_source: Callable[..., RolloutSource] = RolloutSource,
    **train: Any,
) -> list[dict[str, Any]]:
    """The records of a run, which ends after ``stop_after`` steps (0: at its end)."""
    values = {**train, **({"steps": steps} if steps else {})}
    config = job(root, run, dataclasses.replace(TRAIN, **values), rl)
    records: list[dict[str, Any]] = []

    def should_stop() -> bool:
        count = sum(record["kind"] == "train" for record in records)
        return bool(stop_after) and count >= stop_after - 1

    hooks = [FunctionHooks(on_record=records.append, should_stop=should_stop)]
    Trainer(config, source=make_source(config, rl, engine), hooks=hooks).run()
    return records


def weights_digest(root: Store, run: str) -> str:
    """SHA-256 of the weights and the optimizer's state of the latest checkpoint."""
    latest = checkpoint.load(root.child("runs", run), optimizer=True)
    sha = hashlib.sha256(str(latest.step).encode())
    for name, tensor in sorted({**latest.weights, **(latest.optimizer or {})}.items()):
        sha.update(name.encode() + tensor.numpy().tobytes())
    return sha.hexdigest()
