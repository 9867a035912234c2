"""The protocol over a real engine with a real (untrained) model."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.cuda_graphs import StepResult
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.grammar import MAX_CACHED, Grammars
from nanochat_ray.engine.kernels import LEVELS
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.request import EngineFull, Request, SamplingParams
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.client import OutputStream
from nanochat_ray.serve.generation import Limits
from nanochat_ray.serve.local import LocalClient
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.serving import get, open_stream, post, serving
from tests.tiny import hold_up_grammars
from tests.waiting import wait_for, wait_until_idle

TOK = Tokenizer.bytes_only()
USER = [{"role": "user", "content": "hello"}]


def make_model() -> GPT:
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "sequence_len": 512}
    model = GPT(ModelConfig.modern(vocab_size=TOK.vocab_size, **shape))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


def make_client(**settings: int) -> LocalClient:
    engine = Engine.from_model(make_model(), TOK, EngineConfig(**settings))
    return LocalClient(engine)


@pytest.fixture(scope="module")
def local() -> Iterator[LocalClient]:
    client = make_client(max_num_seqs=4, max_num_batched_tokens=64, max_queue_size=8)
    yield client
    client.close()
    client.engine.check_integrity()


@pytest.fixture(scope="module")
def url(local: LocalClient) -> Iterator[str]:
    with serving(build_app(local, TOK, "tiny", local.max_model_len)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_a_forced_call_fits_its_schema(client: openai.OpenAI) -> None:
    seat = {"type": "object", "properties": {"row": {"type": "integer"}}, "required": ["row"]}
    parameters = {
        "properties": {"seats": {"type": "array", "items": {"$ref": "#/$defs/S"}, "maxItems": 2}},
        "required": ["seats"],
        "$defs": {"S": seat},
    }
    book = {"name": "book", "parameters": parameters}
    answer = client.chat.completions.create(
        model="tiny",
        messages=USER,
        tools=[{"type": "function", "function": f} for f in ({"name": "ping"}, book)],
        tool_choice={"type": "function", "function": {"name": "book"}},
        response_format={"type": "json_object"},  # about text, of which there is none
        seed=1,
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.function.name == "book"
    (seats,) = json.loads(call.function.arguments).values()
    assert all(set(s) == {"row"} and isinstance(s["row"], int) for s in seats)
    events = client.responses.create(
        model="tiny",
        input="hi",
        tools=[{"type": "function", **book, "strict": False}],
        tool_choice="required",
        stream=True,
        extra_body={"seed": 1},
    )
    items = list(events)
    kinds = [e.type.removeprefix("response.") for e in items]
    ends = ["function_call_arguments.done", "output_item.done", "completed"]
    assert kinds[2] == "output_item.added"
    assert set(kinds[3:-3]) == {"function_call_arguments.delta"}
    assert kinds[-3:] == ends
    argument_text = "".join(e.delta for e in items if e.type.endswith("arguments.delta"))
    assert items[-1].response.output[0].arguments == argument_text
    assert "seats" in json.loads(argument_text)
    assert [e.sequence_number for e in items] == list(range(len(items)))


def test_seeds_reproduce_alone_and_together(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=USER, seed=seed, max_tokens=20, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 20
        assert answer.choices[0].finish_reason == "length"
        return answer.choices[0].message.content or ""

    alone = [ask(seed) for seed in range(4)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone
    many = client.chat.completions.create(
        model="tiny", messages=USER, seed=0, n=4, max_tokens=20, extra_body={"ignore_eos": True}
    )
    assert [c.message.content for c in many.choices] == alone


def test_a_grammar_that_compiles_for_long_holds_up_nobody(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, may_go_on = hold_up_grammars(monkeypatch)

    def ask(**fields: object) -> str:
        answer = client.completions.create(
            model="tiny", prompt="a", max_tokens=5, extra_body=fields
        )
        return answer.choices[0].text

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask, structured_outputs={"choice": ["late", "soon"]})
        assert compiling.wait(60)
        ask()
        assert not slow.done()
        may_go_on.set()
        assert slow.result() in ("late", "soon")


def test_each_of_many_grammars_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more are asked for at a time than are kept."""
    count, client = (
        3 * MAX_CACHED // 2,
        make_client(max_num_seqs=4, max_num_batched_tokens=64, max_queue_size=2 * MAX_CACHED),
    )
    grammar_texts: list[str] = []
    compile_it = Grammars._compile

    def count_calls(grammars: Grammars, text: str) -> Any:
        grammar_texts.append(text)
        return compile_it(grammars, text)

    monkeypatch.setattr(Grammars, "_compile", count_calls)

    async def ask(i: int) -> None:
        params = SamplingParams(grammar={"choice": [f"{i}"]}, max_tokens=5)
        stream = OutputStream()
        await client.submit(Request(id=f"{i}", prompt=[1], params=params), stream)
        async for outputs in stream:
            assert outputs[-1].error is None

    async def ask_all() -> None:
        await asyncio.gather(*(ask(i) for i in range(count)))

    asyncio.run(ask_all())
    client.close()
    assert len(grammar_texts) == count


def test_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "messages": USER, "seed": 3, "max_tokens": 40}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    stream_text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert stream_text == whole.choices[0].message.content


def test_logprobs(client: openai.OpenAI) -> None:
    # Special tokens have no text, and no logprob there.
    bias = {str(token): -100 for token in TOK.specials.values()}
    answer = client.completions.create(
        model="tiny", prompt="ab", temperature=0, max_tokens=4, logprobs=2, logit_bias=bias
    )
    result = answer.choices[0].logprobs
    assert result is not None
    assert len(result.tokens) == len(result.token_logprobs) == len(result.text_offset) == 4
    assert all(len(top) <= 3 for top in result.top_logprobs)
    assert all(t in top for t, top in zip(result.tokens, result.top_logprobs, strict=True))
    greedy = [
        max(value for token, value in top.items() if token not in TOK.specials)
        for top in result.top_logprobs
    ]
    assert result.token_logprobs == pytest.approx(greedy)
    chat = client.chat.completions.create(
        model="tiny", messages=USER, max_tokens=3, logprobs=True, top_logprobs=1, seed=1
    )
    assert chat.choices[0].logprobs is not None
    assert all(len(t.top_logprobs) == 1 for t in chat.choices[0].logprobs.content)
    assert all(t.logprob <= 0 for t in chat.choices[0].logprobs.content)


def test_penalties_and_bias_are_taken(client: openai.OpenAI) -> None:
    text = client.completions.create(
        model="tiny", prompt="x", temperature=0, max_tokens=5, logit_bias={"65": 100}
    )
    assert text.choices[0].text == "AAAAA"
    text = client.completions.create(
        model="tiny",
        prompt="x",
        temperature=0,
        max_tokens=50,
        presence_penalty=2,
        frequency_penalty=2,
        extra_body={"ignore_eos": True},
    )
    assert len(set(text.choices[0].text)) > 5


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_frees_the_slots_within_a_step(
    url: str, local: LocalClient, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"messages": USER, "stream": True, "max_tokens": 450, "ignore_eos": True, "n": n}
    body = json.dumps(fields).encode()
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    abort_steps: list[int] = []  # the engine's steps when each abort came
    abort = local._engine_loop.abort

    def note_abort(request_id: str) -> None:
        abort_steps.append(local.engine.stats().steps)
        abort(request_id)

    run, steps = local.engine.runner.run, itertools.count()

    def stand_still(chunks: list[ScheduledChunk], previous_ids: torch.Tensor | None) -> StepResult:
        # In the middle of the answers, or they could be complete before the client leaves.
        if next(steps) >= 20:
            wait_for(lambda: len(abort_steps) == n, 60, "the aborts")
        return run(chunks, previous_ids)

    monkeypatch.setattr(local._engine_loop, "abort", note_abort)
    monkeypatch.setattr(local.engine.runner, "run", stand_still)
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b"200 OK" in connection.recv(65536)
        wait_for(lambda: local.engine.stats().running == n)
    wait_until_idle(local.engine)
    assert len(abort_steps) == n
    assert local.engine.stats().steps <= abort_steps[-1] + 2  # the one that ran, and one begun then


def test_a_full_queue_is_said_so(url: str, local: LocalClient) -> None:
    body = {"prompt": ["x"] * 20, "max_tokens": 100, "ignore_eos": True}
    response = post(f"{url}/v1/completions", json=body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["code"] == "queue_full"
    wait_until_idle(local.engine)  # what was accepted is given up


@pytest.fixture
def may_be_late() -> threading.Event:
    """While it is not set, no deadline passes, and no answer goes on that could miss one."""
    event = threading.Event()
    event.set()
    return event


@pytest.fixture
def hurried_url(
    local: LocalClient, may_be_late: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Another server over the same engine, whose requests have a deadline. It passes when an answer
    has 3 tokens, or while a request waits: whatever the speed of the machine. Four requests without
    one stand still until another comes."""
    run, scheduler = local.engine.runner.run, local.engine.scheduler
    has_come = threading.Event()

    def late(chunks: list[ScheduledChunk], previous_ids: torch.Tensor | None) -> StepResult:
        if [s.request.deadline for s in scheduler.running] == [None] * 4 and not has_come.is_set():
            wait_for(lambda: local._engine_loop._inbox, 60, "another request")
            has_come.set()
        decoding = [s for s in scheduler.running if len(s.tokens) >= len(s.request.prompt) + 3]
        for s in (*decoding, *scheduler.waiting):
            if s.request.deadline is not None:
                assert may_be_late.wait(60)
                object.__setattr__(s.request, "deadline", time.monotonic())
        return run(chunks, previous_ids)

    monkeypatch.setattr(local.engine.runner, "run", late)
    limits = Limits(request_timeout_s=600)
    with serving(build_app(local, TOK, "tiny", local.max_model_len, limits=limits)) as url:
        yield url
    wait_until_idle(local.engine)


@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_that_takes_too_long_is_ended(
    hurried_url: str, local: LocalClient, may_be_late: threading.Event, n: int
) -> None:
    fields = {"prompt": "x", "max_tokens": 450, "n": n, "ignore_eos": True}
    late = post(f"{hurried_url}/v1/completions", json=fields)
    assert (late.status_code, late.headers["x-should-retry"]) == (504, "false")
    error = late.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "request_timeout")
    wait_until_idle(local.engine)  # else the next request may have to wait for slots
    may_be_late.clear()
    streaming = {**fields, "stream": True}
    with open_stream("POST", f"{hurried_url}/v1/completions", json=streaming) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        first = next(lines)
        may_be_late.set()  # an answer that has not begun would be an error
        *_, token, end = filter(None, [first, *lines])
    assert json.loads(token.removeprefix("data: "))["choices"]
    assert json.loads(end.removeprefix("data: "))["error"]["code"] == "request_timeout"


def test_an_answer_that_waits_too_long_is_refused(
    hurried_url: str, url: str, local: LocalClient
) -> None:
    fields = {"prompt": "x", "max_tokens": 450, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        ask = functools.partial(post, f"{url}/v1/completions")
        others = pool.submit(ask, json={**fields, "n": 4})
        wait_for(lambda: local.engine.stats().running == 4)
        late = post(f"{hurried_url}/v1/completions", json={**fields, "stream": True})
        assert late.status_code == 504
        assert others.result().status_code == 200


def test_health_tells_the_load(url: str) -> None:
    result = get(f"{url}/health").json()
    assert result["status"] == "ok"
    assert result["engines"][0]["slots"] == 4
    assert result["engines"][0]["kernels"] in {*LEVELS, "torch"}


def test_metrics_tell_what_happened(url: str, client: openai.OpenAI) -> None:
    def figures() -> dict[str, float]:
        lines = get(f"{url}/metrics").text.splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if not line.startswith("#")
        }

    before = figures()
    client.completions.create(
        model="tiny", prompt="x" * 40, max_tokens=9, extra_body={"ignore_eos": True}
    )
    after = figures()

    def rise(name: str, label: str = "") -> float:
        key = f'nanochat_{name}{{{label}model_name="tiny"}}'
        return after[key] - before.get(key, 0)

    assert rise("generation_tokens_total") == 9
    assert rise("prompt_tokens_total") == 41
    assert rise("time_to_first_token_seconds_count") == 1
    assert rise("inter_token_latency_seconds_count") <= 8  # steps may come together
    assert rise("e2e_request_latency_seconds_count") == 1
    assert rise("request_success_total", 'finished_reason="length",') == 1
    assert rise("prefix_cache_queries_total", 'engine="0",') > 0
    running = 'nanochat_num_requests_running{engine="0",model_name="tiny"}'
    wait_for(lambda: figures()[running] == 0)


def test_usage_tells_what_was_cached(client: openai.OpenAI) -> None:
    body = {"model": "tiny", "prompt": "y" * 100, "max_tokens": 2}
    cached_counts = []
    for _ in range(2):
        usage = client.completions.create(**body).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached_counts.append(usage.prompt_tokens_details.cached_tokens)
    assert cached_counts == [0, 96]


def test_best_of_gives_the_likeliest(client: openai.OpenAI) -> None:
    fields = {"model": "tiny", "prompt": "ab", "seed": 1, "max_tokens": 6, "logprobs": 0}

    def likelihood(choice: openai.types.CompletionChoice) -> float:
        assert choice.logprobs is not None
        scores = choice.logprobs.token_logprobs or []
        return sum(scores) / len(scores)

    every = client.completions.create(**fields, n=4).choices
    best = client.completions.create(**fields, n=2, best_of=4).choices
    reference = sorted(every, key=likelihood, reverse=True)[:2]
    assert [c.text for c in best] == [c.text for c in reference]
    assert [c.index for c in best] == [0, 1]
    del fields["logprobs"]
    (one,) = client.completions.create(**fields, best_of=4).choices
    assert one.text == reference[0].text
    assert one.logprobs is None
    with pytest.raises(openai.BadRequestError, match="best_of=2"):
        client.completions.create(**fields, best_of=2, stream=True)


def test_an_answer_fits_its_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=USER,
        max_tokens=200,
        temperature=0,
        # An untrained model might write blanks for ever, which JSON allows.
        logit_bias={str(ord(c)): -100 for c in " \t\r\n"},
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    result = json.loads(answer.choices[0].message.content or "")
    assert set(result) == {"a", "b"}
    assert answer.choices[0].finish_reason == "stop"
    completion = client.completions.create(
        model="tiny", prompt="x", extra_body={"structured_outputs": {"choice": ["yes", "no"]}}
    )
    assert completion.choices[0].text in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="outputs: this regex does not compile"):
        client.completions.create(
            model="tiny", prompt="x", extra_body={"structured_outputs": {"regex": "("}}
        )


@pytest.mark.parametrize("as_text", [False, True])
def test_a_continuation_s_scores_are_the_model_s(url: str, as_text: bool) -> None:
    """What lm-eval asks for and where it looks for a continuation, behind as many tokens as it
    counted in the context, against a plain forward."""
    pairs = [("the quick", " brown fox"), ("é", "!")]
    prompts: list[Any] = ["".join(pair) for pair in pairs]
    if not as_text:
        prompts = [[TOK.bos, *TOK.encode(text)] for text in prompts]
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choices = post(f"{url}/v1/completions", json=body).json()["choices"]
    for (context, text), choice in zip(pairs, choices, strict=True):
        token_ids = {"prompt": context, "add_special_tokens": not as_text}
        start = post(f"{url}/tokenize", json=token_ids).json()["count"]
        ids = [TOK.bos, *TOK.encode(context + text)]
        first = len(ids) - len(TOK.encode(text))
        with torch.inference_mode():
            logs = make_model()(torch.tensor([ids]))[0].log_softmax(-1)
        reference = logs[range(first - 1, len(ids) - 1), ids[first:]].tolist()
        # The last one is that of the token which was generated.
        assert choice["logprobs"]["token_logprobs"][start:-1] == pytest.approx(reference, abs=1e-4)
        tops = choice["logprobs"]["top_logprobs"][start:-1]
        greedy = logs[first - 1 : -1].max(-1).values.tolist()
        assert [max(top.values()) for top in tops] == pytest.approx(greedy, abs=1e-4)


def test_a_special_token_by_its_name(url: str) -> None:
    """As lm-eval asks for the token before a text without a context."""
    name = get(f"{url}/tokenizer_info").json()["bos_token"]
    for plain, tokens in ((False, [TOK.bos]), (True, [TOK.bos, *TOK.encode(name)])):
        body = {"prompt": name, "add_special_tokens": plain}
        assert post(f"{url}/tokenize", json=body).json()["tokens"] == tokens


def test_a_prompt_s_scores_are_the_model_s(client: openai.OpenAI) -> None:
    ids = [TOK.bos, *TOK.encode("the quick brown fox")]
    answer = client.completions.create(
        model="tiny", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    result = answer.choices[0].logprobs
    assert result is not None
    with torch.inference_mode():
        logits = make_model()(torch.tensor([ids]))[0]
    reference = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
    assert result.token_logprobs[0] is None
    assert result.token_logprobs[1 : len(ids)] == pytest.approx(reference, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_alone_generates_nothing(client: openai.OpenAI, url: str, stream: bool) -> None:
    body = {"prompt": "the quick", "echo": True, "max_tokens": 0, "stream": stream}
    for options in ({}, {"logprobs": 1}):
        answer = post(f"{url}/v1/completions", json={**body, **options})
        assert answer.status_code == 200
        if stream:
            lines = [x.removeprefix("data: ") for x in answer.text.splitlines() if x]
            choices = [json.loads(x)["choices"][0] for x in lines[:-1]]
        else:
            choices = answer.json()["choices"]
            assert answer.json()["usage"]["completion_tokens"] == 0
        assert "".join(c["text"] for c in choices) == "the quick"
        assert choices[-1]["finish_reason"] == "length"
        tokens_with_logprobs = [
            x for c in choices if c["logprobs"] for x in c["logprobs"]["tokens"]
        ]
        assert len(tokens_with_logprobs) == (9 if options else 0)


def test_a_queue_that_fills_up_late_is_429(
    local: LocalClient, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(request: Request) -> None:
        raise EngineFull("max_queue_size=8 requests are waiting already")

    monkeypatch.setattr(local.engine, "add", add)
    for stream in (False, True):
        response = post(f"{url}/v1/completions", json={"prompt": "x", "stream": stream})
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"


def test_requests_on_their_way_count_as_waiting() -> None:
    client = make_client(max_num_seqs=1, max_queue_size=1)
    client.close()
    engine = client.engine
    loop = EngineLoop(engine, lambda outputs: None)  # not started: nothing leaves its inbox
    for name in ("a", "b"):
        loop.submit(Request(id=name, prompt=[1], params=SamplingParams()))
    loop._num_arriving, loop._inbox = 2, []
    with pytest.raises(EngineFull):
        loop.submit(Request(id="c", prompt=[1], params=SamplingParams()))
