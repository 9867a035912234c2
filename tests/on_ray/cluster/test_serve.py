"""An endpoint with an engine on each node, of which one is lost under streams."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from nanochat_ray.bench import load
from nanochat_ray.bench.drill import VOCAB
from nanochat_ray.bench.http_stream import Result
from nanochat_ray.storage import Store
from tests.on_ray.cluster.nodes import Node, Nodes
from tests.on_ray.serve.tiny_run import engines, write_checkpoint
from tests.tiny import TOKENIZER
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PORT, NUM_STREAMS, TOKENS = 8000, 6, 400
ENGINE, INGRESS = r"ray::ServeReplica:nanochat:engine", r"ray::ServeReplica:nanochat:ingress"
STANDSTILL_S = 15.0
"""``liveness_timeout_s`` of 10, and what migration takes."""
DEADLINE_S = 240.0
"""Of what is waited for: a busy machine takes that long to start a replica."""


@pytest.fixture(scope="module")
def url(nodes: Nodes, storage: str) -> Iterator[str]:
    """Three engines, of 2 of the 3 logical CPUs of a node each."""
    root = Store.at(storage).child("serve")
    # Deep enough that streams wait for engines: what an ingress holds back would hide a cut.
    write_checkpoint(root, 0, n_layer=16)
    TOKENIZER.save(root.child("tokenizers", TOKENIZER.fingerprint[:16]))
    flags = ["--storage", root.uri, "--run", "tiny", "--num-replicas", "3", "--cpus", "2"]
    flags += ["--host", "0.0.0.0", "--port", str(PORT), "--no-block"]
    environment = {"RAY_ADDRESS": nodes.gcs_address}
    command = [sys.executable, "-m", "nanochat_ray"]
    nodes.run(nodes.head, [*command, "serve", *flags], environment)
    url = f"http://{nodes.head.address}:{PORT}"
    wait_for(lambda: is_served(url), DEADLINE_S, "three engines")
    yield url
    shutdown = "import ray; from ray import serve; ray.init(); serve.shutdown()"
    nodes.run(nodes.head, [sys.executable, "-c", shutdown], environment)


def disturb(url: str, disturbance: Callable[[], None]) -> list[Result]:
    """The answers of streams that it disturbs: all that were running, and one more of each stream.
    Every answer has the text of an undisturbed one."""

    async def run() -> list[Result]:
        prompts = load.random_prompts(NUM_STREAMS, vocab=VOCAB, prompt=24, output=TOKENS)
        # Together, so that each engine gets some: their prefixes keep them there.
        answers = [load.complete(url, "tiny", prompt) for prompt in prompts]
        texts = [answer.text for answer in await asyncio.gather(*answers)]
        assert all(texts)
        is_over = False
        results: list[Result] = []

        async def stream(index: int) -> None:
            last = False
            while not last:
                last = is_over
                result = await load.complete(url, "tiny", prompts[index])
                assert (result.error, result.text) == ("", texts[index])
                results.append(result)

        async with asyncio.timeout(240), asyncio.TaskGroup() as group:
            for index in range(NUM_STREAMS):
                group.create_task(stream(index))
            while len(results) < NUM_STREAMS:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # in the middle of an answer
            results.clear()
            await asyncio.to_thread(disturbance)
            is_over = True
        return results

    return asyncio.run(run())


def check_gap(name: str, results: list[Result]) -> float:
    """The longest time without a token, the first one's included."""
    gap = max(max([result.first_s, *result.gaps_s]) for result in results)
    print(f"\n{name}: {len(results)} answers, 0 broken, 0 changed, longest gap {gap:.1f} s")
    assert gap <= STANDSTILL_S
    return gap


def wait_for_engines(name: str, url: str, start: float) -> None:
    """Waits for three engines and an answer."""
    wait_for(lambda: is_served(url), DEADLINE_S, "three engines")
    print(f"{name}: three engines again after {time.monotonic() - start:.1f} s")


def is_served(url: str) -> bool:
    return len(engines(url)) == 3


def spare_node(nodes: Nodes) -> Node:
    """One with an engine that no stream passes through on its way to the client."""
    return next(
        node for node in nodes.nodes[1:] if node.processes(ENGINE) and not node.processes(INGRESS)
    )


def test_engines_are_on_all_nodes(nodes: Nodes, url: str) -> None:
    assert [len(node.processes(ENGINE)) for node in nodes.nodes] == [1, 1, 1]


def test_cut_node_breaks_no_stream(nodes: Nodes, url: str) -> None:
    node = spare_node(nodes)
    try:
        results = disturb(url, lambda: nodes.cut(node))
    finally:
        nodes.restore(node)
    start = time.monotonic()
    # Nothing but a time limit notices such a loss: a shorter gap means that nothing was cut.
    assert check_gap("cut node", results) > 5.0
    wait_for_engines("cut node, since it is restored", url, start)


def test_killed_raylet_breaks_no_stream(nodes: Nodes, url: str) -> None:
    node = spare_node(nodes)
    (raylet,) = node.processes(r"\S*/raylet ")
    try:
        results = disturb(url, raylet.kill)
    finally:
        nodes.restore(node)
    start = time.monotonic()
    check_gap("killed raylet", results)
    wait_for_engines("killed raylet, since the node is restored", url, start)


def test_head_that_starts_again_serves(nodes: Nodes, url: str) -> None:
    (prompt,) = load.random_prompts(1, vocab=VOCAB, prompt=24, output=TOKENS)
    before = asyncio.run(load.complete(url, "tiny", prompt))
    start = time.monotonic()
    nodes.restore(nodes.head)
    print(f"\nhead: Ray runs again after {time.monotonic() - start:.1f} s")
    wait_for_engines("head, since its end", url, start)
    after = asyncio.run(load.complete(url, "tiny", prompt))
    assert (after.error, after.text) == ("", before.text)
