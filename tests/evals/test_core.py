"""CORE: texts and token ranges by hand, decisions against a plain forward pass of the model."""

from __future__ import annotations

import json
import math
import random
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray.cli import eval as job
from nanochat_ray.cli import eval_core
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.evals import core, core_data
from nanochat_ray.evals.core import CoreScore, Option, Question
from nanochat_ray.evals.core_data import CoreTask
from nanochat_ray.evals.results import Results, wilson_interval
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from tests.evals.test_bpb import save
from tests.tiny import TOKENIZER, tiny_config

CHOICE = CoreTask("choice", "x.jsonl", "multiple_choice", 1, 0.25, "\nA: ")
SCHEMA = CoreTask("schema", "x.jsonl", "schema", 0, 0.5)
LM = CoreTask("lm", "x.jsonl", "language_modeling", 1)
CHOICES = [
    {"query": "1+1", "choices": ["2", "23"], "gold": 0},
    {"query": "2+2", "choices": ["5", "4"], "gold": 1},
]
SCHEMAS = [{"context_options": ["the cat", "a dog"], "continuation": "sat.", "gold": 1}]
SENTENCES = [
    {"context": " The sky is ", "continuation": "blue"},
    {"context": "Snow is", "continuation": "white"},
]


def encode(text: str) -> list[int]:
    return [TOKENIZER.bos, *TOKENIZER.encode(text)]


def test_texts_of_each_kind() -> None:
    assert core.texts(CHOICE, CHOICES[0], CHOICES[1:]) == [
        "2+2\nA: 4\n\n1+1\nA: 2",
        "2+2\nA: 4\n\n1+1\nA: 23",
    ]
    assert core.texts(SCHEMA, SCHEMAS[0], []) == ["the cat sat.", "a dog sat."]
    assert core.texts(LM, SENTENCES[0], SENTENCES[1:]) == [
        "Snow is white\n\nThe sky is",
        "Snow is white\n\nThe sky is blue",
    ]


def test_tokens_that_are_scored() -> None:
    """With a tokenizer of bytes, so that positions are characters."""
    item = core.question(CHOICE, TOKENIZER, CHOICES, 0)
    before = "2+2\nA: 4\n\n1+1\nA: 2"  # both begin so: the first has no token of its own
    assert item == Question(
        [
            Option(encode(before), len(encode(before))),
            Option(encode(before + "3"), len(before) + 1),
        ],
        0,
    )
    item = core.question(SCHEMA, TOKENIZER, SCHEMAS, 0)
    scored_tokens = [o.token_ids[o.start :] for o in item.options]
    assert scored_tokens == [TOKENIZER.encode(" sat.")] * 2
    assert item.answer == 1
    item = core.question(LM, TOKENIZER, SENTENCES, 0)
    (option,) = item.options
    assert option.token_ids[option.start :] == TOKENIZER.encode(" blue")
    assert item.answer is None


def logprobs(*values: float, top: int = 0) -> list[TokenLogprob]:
    return [TokenLogprob(logprob=v, top=[(top, v)]) for v in values]


def test_decisions_by_hand() -> None:
    options = [Option([1, 2, 3], 1), Option([1, 4], 1), Option([1, 5], 1)]
    # Means, not sums: -1.0, -1.1, -3.
    scores = [logprobs(-1.5, -0.5), logprobs(-1.1), logprobs(-3.0)]
    assert [core.is_right(Question(options, i), scores) for i in range(3)] == [True, False, False]
    # Of equal ones the first.
    scores = [logprobs(-2.0, -2.0), logprobs(-1.0), logprobs(-1.0)]
    assert [core.is_right(Question(options, i), scores) for i in range(3)] == [False, True, False]
    greedy = Question([Option([1, 7, 7], 1)], None)
    assert core.is_right(greedy, [logprobs(-1.0, -2.0, top=7)])
    assert not core.is_right(greedy, [[*logprobs(-1.0, top=7), *logprobs(-1.0, top=8)]])


def test_figures_by_hand() -> None:
    score = CoreScore("x", 30, 40, 0.5)
    assert score.centered_accuracy == pytest.approx(0.5)
    assert score.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 40) / 0.5)
    mean, error = core.core_metric([score, CoreScore("y", 10, 40, 0.25)])
    assert mean == pytest.approx(0.25)
    second = math.sqrt(0.25 * 0.75 / 40) / 0.75
    assert error == pytest.approx(math.hypot(score.standard_error, second) / 2)
    # Wilson's paper, with z = 1.96: 8 of 10.
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(10, 10)[1] == 1.0


def test_shots_never_hold_the_question() -> None:
    examples = [{"context": f"c{i}", "continuation": f"a{i}"} for i in range(12)]
    task = CoreTask("lm", "x.jsonl", "language_modeling", 10)
    for index in range(12):
        (option,) = core.question(task, TOKENIZER, examples, index).options
        text = TOKENIZER.decode(option.token_ids[1:])
        assert text.count(f"c{index} a{index}") == 1
        assert text.endswith(f"c{index} a{index}")
    assert core.choose(list(range(5)), 3) == core.choose(list(range(5)))[:3]  # type: ignore[arg-type]
    random.seed(0)
    first = core.question(task, TOKENIZER, examples, 3)
    assert core.question(task, TOKENIZER, examples, 3) == first


def reference(gpt: GPT, task: CoreTask, examples: list[dict[str, Any]], length: int) -> list[bool]:
    """By the definition: a forward pass over each whole text."""
    decisions = []
    for index in range(len(examples)):
        item = core.question(task, TOKENIZER, examples, index)
        losses = []
        for option in item.options:
            surplus = max(0, len(option.token_ids) - length)
            ids, start = option.token_ids[surplus:], option.start - surplus
            with torch.inference_mode():
                logs = gpt(torch.tensor([ids]))[0].log_softmax(-1)
            rows = range(start - 1, len(ids) - 1)
            losses.append([-float(logs[row, ids[row + 1]]) for row in rows])
            is_greedy = all(int(logs[row].argmax()) == ids[row + 1] for row in rows)
        if item.answer is None:
            decisions.append(is_greedy)
        else:
            means = [sum(x) / len(x) for x in losses]
            decisions.append(means.index(min(means)) == item.answer)
    return decisions


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
@pytest.mark.parametrize("layout", ["slots", "paged"])
@pytest.mark.parametrize("length", [28, 0])
def test_decisions_equal_a_forward_pass(kind: core_data.Kind, layout: str, length: int) -> None:
    """``length``: of the engine's context; 0: nanochat's, over which attention slides."""
    rng = random.Random(3)

    def text(length: int) -> str:
        return "".join(rng.choice("abcd ") for _ in range(length)) + "e"

    examples: list[dict[str, Any]] = []
    for _ in range(24):
        options = [text(rng.randrange(1, 9)) for _ in range(3)]
        gold = rng.randrange(3)
        examples.append(
            {"query": text(12), "choices": options, "gold": gold}
            | {"context_options": options, "continuation": text(1), "context": text(12)}
        )
    task = CoreTask("x", "x.jsonl", kind, 2, 1 / 3)
    gpt = GPT(tiny_config(sequence_len=28))  # shorter than some of the texts
    gpt.init_weights(torch.Generator().manual_seed(5))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(1))
    gpt.eval().requires_grad_(False)
    # A queue that holds less than the options of one question.
    config = EngineConfig(
        max_num_seqs=4,
        max_queue_size=2,
        max_model_len=length,
        kv_layout=layout,  # type: ignore[arg-type]
    )
    config = core.core_engine_config(gpt.config, config)
    engine = LocalEngine.from_model(gpt, TOKENIZER, config)
    calls: list[tuple[int, int]] = []
    score, decisions = core.evaluate(
        engine, TOKENIZER, task, examples, progress=lambda *call: calls.append(call)
    )
    assert decisions == reference(gpt, task, examples, length or 280)
    assert (score.correct, score.total) == (sum(decisions), 24)
    assert (score.num_cropped > 0) == (length == 28)
    assert calls[-1] == (24, 24)


def test_core_engine_touches_little_memory() -> None:
    model = tiny_config(sequence_len=28)
    config = core.core_engine_config(model, EngineConfig(max_num_batched_tokens=100))
    assert config.max_num_seqs == 100 // 32
    assert (config.max_model_len, config.prefix_cache_tokens) == (280, 560)
    small = EngineConfig(max_num_seqs=2, prefix_cache_tokens=64, max_model_len=40)
    assert core.core_engine_config(model, small) == small


def write(folder: Path, count: int = 12) -> None:
    lines = [{"context": f"{i} is", "continuation": str(i)} for i in range(count)]
    texts = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "bigbench_operators.jsonl").write_text(texts)


def test_files_are_found_in_folder_and_zip(tmp_path: Path) -> None:
    folder = tmp_path / "bundle" / "eval_data"
    folder.mkdir(parents=True)
    write(folder)
    (folder / "other.jsonl").write_text("")
    assert core_data.find_files(str(tmp_path), tmp_path / "c").keys() == {
        "bigbench_operators.jsonl"
    }
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "bigbench_operators.jsonl", "../../bigbench_operators.jsonl")
    paths = core_data.find_files(str(archive), tmp_path / "cache")
    assert paths["bigbench_operators.jsonl"].is_relative_to(tmp_path / "cache")
    for source in (str(tmp_path / "none.zip"), str(tmp_path / "cache" / "empty")):
        with pytest.raises(ValueError, match=r"core=.* is not allowed"):
            core_data.find_files(source, tmp_path / "c")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("copa.jsonl", "text")
    damage = archive.read_bytes().replace(zlib.compress(b"text")[2:4], b"\xff\xff")
    for data in (b"PK", damage):
        archive.write_bytes(data)
        with pytest.raises(ValueError, match="zip"):
            core_data.find_files(str(archive), tmp_path / "c")


def test_a_part_of_the_files_is_not_taken_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, cache = tmp_path / "published.zip", tmp_path / "cache"
    files = ("copa.jsonl", "squad.jsonl")
    with zipfile.ZipFile(archive, "w") as file:
        for name in files:
            file.writestr(name, "{}" * 1000)
    monkeypatch.setattr(core_data, "BUNDLE_URL", archive.as_uri())
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])  # the connection is cut
    with pytest.raises(ValueError, match=r"core='bundle' is not allowed: .* no whole .zip"):
        core_data.find_files("bundle", cache)
    archive.write_bytes(whole)

    read = zipfile.ZipFile.read
    with monkeypatch.context() as patch:
        patch.setattr(
            zipfile.ZipFile,
            "read",
            lambda file, entry: 1 / 0 if entry.filename == files[1] else read(file, entry),
        )
        with pytest.raises(ZeroDivisionError):  # as if the process were stopped
            core_data.find_files("bundle", cache)
    assert core_data.find_files("bundle", cache).keys() == set(files)
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == [
        "core",
        "eval_bundle.zip",
    ]


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "x.jsonl:1: "),
        ("[" * 100_000, "x.jsonl:1: "),
        ('"\udcff"', "x.jsonl:1: "),
        ("[]", r"x.jsonl:1: \[\] is not allowed"),
        ('{"query": 5, "choices": ["a"], "gold": 0}', "query=5"),
        ('{"query": "q", "choices": ["a"], "gold": 1}', "gold=1"),
        ('{"query": "q", "choices": [1], "gold": 0}', r"\[1\]"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "1 examples, but 1 shots"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, line: str, match: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=match):
        core_data.load(CHOICE, path)


def test_the_command_stores_and_resumes(
    root: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(root, "base", "base")
    write(tmp_path)
    args = job.Args(storage=root.uri, threads=1, run="base", core=str(tmp_path))
    job.main(args)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["core_tasks"]["bigbench_operators"]["accuracy"] == result["core_of_some_tasks"]
    assert any("CORE over 1 of 22 tasks" in line for line in lines)
    results = json.loads(root.child("runs", "base", "evals").read_text("step-000001.json"))
    assert results["core"]["bigbench_operators"]["total"] == 12
    with monkeypatch.context() as patch:
        patch.setattr(core, "evaluate", lambda *_, **__: pytest.fail("it is measured again"))
        job.main(args)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    write(tmp_path, 13)  # other questions
    job.main(args)
    capsys.readouterr()
    run = root.child("runs", "base")
    assert Results(run, "step-000001", "other").find("core", "bigbench_operators", {}) is None
    run.child("evals").write_text("step-000001.json", "[]")
    with pytest.raises(ValueError, match=r"step-000001.json is damaged"):
        Results(run, "step-000001", "x")
    with pytest.raises(ValueError, match="core_count=10 is not allowed"):
        job.Args(core_count=10)


def test_the_tasks_are_those_of_core() -> None:
    """As DCLM and nanochat's core.yaml have them, by groups."""
    groups: dict[tuple[str, int, float, str], set[str]] = {}
    for task in core_data.TASKS:
        assert task.file.endswith(".jsonl")
        key = task.kind, task.num_shots, task.baseline, task.delimiter
        groups.setdefault(key, set()).add(task.label.removeprefix("bigbench_"))
    choice, lm, answer = "multiple_choice", "language_modeling", "\nAnswer: "
    assert groups == {
        (choice, 0, 0.25, " "): {"hellaswag_zeroshot", "openbook_qa"},
        (choice, 0, 0.5, " "): {"copa"},
        (choice, 3, 0.25, " "): {"agi_eval_lsat_ar"},
        (choice, 10, 0.25, " "): {"hellaswag", "language_identification"},
        (choice, 10, 0.403, " "): {"commonsense_qa"},
        (choice, 10, 0.25, answer): {"arc_easy", "arc_challenge"},
        (choice, 10, 0.5, answer): {"piqa"},
        (choice, 10, 0.62, answer): {"boolq"},
        ("schema", 0, 0.5, " "): {"winograd", "winogrande"},
        (lm, 0, 0.0, " "): {"lambada_openai", "coqa"},
        (lm, 10, 0.0, answer): {"jeopardy"},
        (lm, 10, 0.0, " "): {
            *("qa_wikidata", "dyck_languages", "cs_algorithms", "operators"),
            *("repeat_copy_logic", "squad"),
        },
    }
    assert len({task.label for task in core_data.TASKS}) == 22


def test_the_rate_leaves_out_what_was_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that continues behind 100 answers gives the 101st after 5 s, the 120th after 10."""
    times = iter((0.0, 5.0, 10.0))
    monkeypatch.setattr(eval_core.time, "perf_counter", lambda: next(times))
    show = eval_core.print_progress("x")
    show(101, 200)
    show(120, 200)
    assert capsys.readouterr().err == "x: 120/200, 2.0 a second, 40 s left\n"
