"""Hostile requests over HTTP beside a seeded one: none is a 5xx, and its answer is the same."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.local import LocalClient
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import calculator_tool
from tests.engine.engine_kit import make_engine, make_model
from tests.serve.serving import post, serving

TOK = Tokenizer.bytes_only()
LONE = "\ud800"
SCHEMAS: list[dict[str, Any]] = [
    {"const": LONE},
    {"type": "object", "properties": {LONE: {"type": "string"}}},
    {"type": "string", "pattern": "("},
    {"$ref": "http://x/y"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"type": "array", "minItems": 10**18, "items": {"type": "string", "minLength": 10**18}},
    {"type": "object", "minProperties": 10**9},
    {"type": "integer", "multipleOf": 0},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"type": "number", "multipleOf": 1e-300},
    {"type": "string", "maxLength": 10**6},
    {"x-guidance": {"item_separator": "(" * 1000}, "type": "object"},
    {"anyOf": [{"type": "object", "properties": {"a": {"const": i}}} for i in range(400)]},
    {"patternProperties": {"(": {}}, "type": "object"},
    {"not": {}},
]
FIELDS: list[dict[str, Any]] = [
    *({"guided_json": schema} for schema in SCHEMAS),
    *({"guided_regex": regex} for regex in (LONE, "(a{1,1000}){1,1000}", "(?=a)b", "(" * 9999)),
    *({"guided_grammar": f"start: {rest}"} for rest in ("start", "<[99999]>", "@x", LONE)),
    {"guided_choice": [LONE]},
    {"structured_outputs": {"choice": [str(i) * 10 for i in range(5000)]}},
    {"temperature": 1e-38},
    {"temperature": 1e-35, "top_p": 5e-324, "repetition_penalty": 100},
    {"temperature": 2, "frequency_penalty": -2, "repetition_penalty": 0.01},
    {"logit_bias": dict.fromkeys(map(str, range(265)), -100)},
    {"stop": [LONE, "\x00"]},
    {"seed": -(2**63)},
    {"cache_salt": LONE},
]
STEADY = {"prompt": "steady", "max_tokens": 150, "seed": 3, "ignore_eos": True}


def test_hostile_requests_hurt_no_stream() -> None:
    model = make_model("modern", sequence_len=512)
    client = LocalClient(make_engine(model, calculator_tool(TOK), TOK.byte_table(), max_num_seqs=8))
    bodies = [{"prompt": "a", "max_tokens": 6, **fields} for fields in FIELDS]
    bodies += [{"prompt": LONE, "echo": True, "logprobs": 3, "max_tokens": n} for n in (0, 2)]
    with serving(build_app(client, TOK, "tiny", 512)) as url, ThreadPoolExecutor(4) as pool:

        def send(body: dict[str, Any]) -> Any:
            headers = {"Content-Type": "application/json"}
            return post(f"{url}/v1/completions", content=json.dumps(body), headers=headers)

        alone = send(STEADY).json()["choices"]
        beside = pool.submit(send, STEADY)
        for body, answer in zip(bodies, pool.map(send, bodies), strict=True):
            assert answer.status_code < 500, (body, answer.text)
            assert len(answer.content) < 20_000
            json.loads(answer.text, parse_constant=lambda name: 1 / 0)  # JSON has no Infinity
        assert beside.result().json()["choices"] == alone
        assert send(STEADY).json()["choices"] == alone
    client.close()
    client.engine.check_integrity()
