"""Roll new checkpoints out under streams, and report what clients saw.

    nanochat-ray serve --run copy --num-replicas 2 --follow latest
    nanochat-ray bench rolls --run copy --rolls 20 --streams 32 --bad 10
    nanochat-ray bench rolls --run copy --rolls 20 --dashboard http://127.0.0.1:8265

It writes checkpoints into the run that the endpoint serves, newer than the run's own: use a copy of
a run. With ``--dashboard`` each is named in the Serve application's ``user_config``, as ``serve
deploy`` does; else the endpoint must follow its run. Every answer is greedy. Its text is compared
with that of an undisturbed answer of the checkpoint that the answer names. Status 1 if an answer
failed, names two checkpoints, has another text, or a bad checkpoint is served.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.bench import load
from nanochat_ray.bench.checkpoint_writer import REASONS, CheckpointWriter
from nanochat_ray.bench.http_stream import Result
from nanochat_ray.bench.rolls_report import Answer, BadCheckpoint, Report, Roll, failures, table
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.storage import Store, absolute, default_root

VOCAB = 256
POLL_S = 0.05
KEEP_LATEST_K = 3
"""Checkpoints that stay in the run, beside those that are leased."""


@dataclass(frozen=True, kw_only=True)
class Args:
    url: str = "http://127.0.0.1:8000"
    """Endpoint."""
    key: str = ""
    """API key."""
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds the runs."""
    run: str = "chat"
    """Run that the endpoint serves; checkpoints are added to it."""
    dashboard: str = ""
    """URL of Ray's dashboard: checkpoints are deployed there. By default the endpoint follows."""
    application: str = "nanochat"
    """With dashboard: the Serve application that gets the checkpoints; others stay as they are."""
    rolls: int = 3
    """Checkpoints to roll out."""
    bad: int = 0
    """Checkpoints to publish that must be refused: incomplete, with another byte, truncated, with
    NaN, worse, with another tokenizer, in turns. Only the first of these takes 30 s."""
    streams: int = 8
    """Answers at a time."""
    prompt: int = 24
    """Tokens of a prompt."""
    tokens: int = 64
    """Of each answer."""
    pause_s: float = 3.0
    """Between two rolls; requests that begin in it are what others are compared with."""
    wait_s: float = 120.0
    """How long a checkpoint may take to be served, or refused."""
    seed: int = 0
    """Of prompts and weights."""

    def __post_init__(self) -> None:
        check_name("run", self.run)
        object.__setattr__(self, "storage", absolute(self.storage))
        for name, least in (
            *(("rolls", 0), ("bad", 0), ("streams", 1), ("prompt", 1), ("tokens", 2), ("seed", 0)),
        ):
            check_int(name, getattr(self, name), least)
        check_float("pause_s", self.pause_s)
        check_float("wait_s", self.wait_s, above=True)
        rule = "0 with dashboard, where only a checkpoint that is named is examined"
        require(not (self.bad and self.dashboard), "bad", self.bad, rule)


class Endpoint:
    """What is asked of the endpoint, and of Ray's dashboard."""

    def __init__(self, args: Args):
        self.args = args
        self.model = load.model_at(args.url, args.key)

    async def complete(self, prompt: load.Prompt) -> Result:
        return await load.complete(self.args.url, self.model, prompt, self.args.key)

    async def health(self) -> dict[str, Any]:
        """Of the endpoint; {} while it does not answer."""
        try:
            text = await asyncio.to_thread(load.fetch, f"{self.args.url}/health", self.args.key)
            return dict(json.loads(text))
        except (OSError, ValueError):
            return {}

    async def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> bool:
        """Until ``condition`` of its health holds; False if that takes too long."""
        until = time.perf_counter() + self.args.wait_s
        while not condition(await self.health()):
            if time.perf_counter() > until:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def deploy(self, name: str) -> None:
        """Names a checkpoint in the application's ``user_config``."""
        url = f"{self.args.dashboard}/api/serve/applications/"
        status = json.loads(_dashboard(url))
        configs = {
            key: app["deployed_app_config"]
            for key, app in status["applications"].items()
            if app.get("deployed_app_config")
        }
        application = self.args.application
        rule = f"a deployed one: {', '.join(configs) or 'there is none'}"
        require(application in configs, "application", application, rule)
        configs[application] = _with_checkpoint(configs[application], name)
        fields = {key: status[key] for key in ("proxy_location", "http_options") if key in status}
        _dashboard(url, json.dumps({**fields, "applications": list(configs.values())}).encode())


def _dashboard(url: str, body: bytes | None = None) -> str:
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    headers = {"content-type": "application/json"}
    headers |= {"authorization": f"Bearer {token}"} if token else {}
    method = "GET" if body is None else "PUT"
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(response.read().decode())


def _with_checkpoint(app: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration of an application whose engine serves ``name``."""
    deployments: dict[str, dict[str, Any]] = {d["name"]: d for d in app.get("deployments") or []}
    engine = {"name": "engine", **deployments.get("engine", {})}
    user_config = {**(engine.get("user_config") or {}), "checkpoint": name}
    deployments["engine"] = {**engine, "user_config": user_config}
    return {**app, "deployments": list(deployments.values())}


def serves(name: str) -> Callable[[dict[str, Any]], bool]:
    """Of a health: whether every engine serves a checkpoint."""

    def condition(health: dict[str, Any]) -> bool:
        versions = [str(e.get("weight_version", "")) for e in health.get("engines", [])]
        return bool(versions) and all(version.startswith(f"{name}-") for version in versions)

    return condition


class Streams:
    """Answers without a pause."""

    def __init__(self, endpoint: Endpoint, prompts: Sequence[load.Prompt]):
        self.endpoint, self.prompts = endpoint, prompts
        self.answers: list[Answer] = []
        self._has_ended = False

    async def texts(self) -> list[str]:
        """Of undisturbed answers; ValueError if one fails."""
        texts = []
        for prompt in self.prompts:
            result = await self.endpoint.complete(prompt)
            url = self.endpoint.args.url
            require(not result.error, "url", url, f"an endpoint that answers: {result.error}")
            texts.append(result.text)
        return texts

    def start(self) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self._stream(i)) for i in range(len(self.prompts))]

    def end(self) -> None:
        """Begins no further answer."""
        self._has_ended = True

    async def _stream(self, index: int) -> None:
        while not self._has_ended:
            index = (index + 1) % len(self.prompts)
            result = await self.endpoint.complete(self.prompts[index])
            self.answers.append(Answer(index, result))
            if result.error:
                await asyncio.sleep(0.2)


async def roll(endpoint: Endpoint, writer: CheckpointWriter) -> Roll:
    """Publishes one checkpoint and waits until every engine serves it."""
    name = await asyncio.to_thread(writer.publish)
    began = time.perf_counter()
    if endpoint.args.dashboard:
        await asyncio.to_thread(endpoint.deploy, name)
    is_served = await endpoint.wait_for(serves(name))
    end = time.perf_counter()
    await asyncio.to_thread(writer.prune, KEEP_LATEST_K)
    return Roll(name, began, end, is_served)


async def publish_bad(
    endpoint: Endpoint, writer: CheckpointWriter, current: str
) -> list[BadCheckpoint]:
    """Publishes them all, waits until they are refused, and deletes them."""
    kinds = [list(REASONS)[i % len(REASONS)] for i in range(endpoint.args.bad)]
    names = [await asyncio.to_thread(writer.publish_bad, kind) for kind in kinds]

    def refusals(health: dict[str, Any]) -> dict[str, str]:
        return dict(health.get("follow", {}).get("refused", {}))

    await endpoint.wait_for(lambda health: set(names) <= refusals(health).keys())
    health = await endpoint.health()
    is_unchanged = serves(current)(health)
    for name in names:
        await asyncio.to_thread(writer.delete, name)
    reasons = refusals(health)
    return [
        BadCheckpoint(kind, name, reasons.get(name, ""), is_unchanged)
        for kind, name in zip(kinds, names, strict=True)
    ]


async def measure(args: Args) -> Report:
    endpoint = Endpoint(args)
    run = Store.at(args.storage).child("runs", args.run)
    writer = CheckpointWriter(run, args.seed)
    prompts = load.random_prompts(
        args.streams, vocab=VOCAB, prompt=args.prompt, output=args.tokens, seed=args.seed
    )
    streams, report = Streams(endpoint, prompts), Report()
    for _ in range(2):  # both sets of weights, undisturbed
        latest = await roll(endpoint, writer)
        name = latest.checkpoint
        require(latest.is_served, "url", args.url, f"one that serves {name} in time")
        digest = checkpoint.weight_version(run, name).rpartition("-")[2]
        report.texts[digest] = await streams.texts()
    texts = list(report.texts.values())
    require(texts[0] != texts[1], "run", args.run, "one whose answers depend on its weights")
    tasks = streams.start()
    try:
        for number in range(args.rolls):
            await asyncio.sleep(args.pause_s)
            latest = await roll(endpoint, writer)
            report.rolls.append(latest)
            print(f"roll {number + 1}: {latest.seconds:.2f} s", file=sys.stderr, flush=True)
        if args.bad:
            report.bad = await publish_bad(endpoint, writer, latest.checkpoint)
        await asyncio.sleep(args.pause_s)
    finally:
        streams.end()
        await asyncio.gather(*tasks)
        report.answers = streams.answers
    return report


def main(args: Args) -> int:
    report = asyncio.run(measure(args))
    print(table(report))
    problems = failures(report)
    for problem in problems:
        print(problem)
    figures = {
        "rolls": [dataclasses.asdict(each) for each in report.rolls],
        "bad": [dataclasses.asdict(each) for each in report.bad],
        "answers": report.figures(),
        "failures": problems,
    }
    print(json.dumps(figures))
    return 1 if problems else 0
