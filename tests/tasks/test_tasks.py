"""Tasks: answers that are right, calculator turns that compute them, splits that never meet."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reasoning_gym

from nanochat_ray.tasks import hub, own, spoken
from nanochat_ray.tasks.own import OwnTask
from nanochat_ray.tasks.phrases import LEADS, vary
from nanochat_ray.tasks.reasoning import KINDS
from nanochat_ray.tasks.registry import DEFAULT_MIXTURE, make_task, names
from nanochat_ray.tasks.task import grade_answer
from nanochat_ray.text.chat import render_conversation
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import calculate

OFFLINE = [name for name in names() if name not in hub.NAMES]
TOK = Tokenizer.bytes_only()


@pytest.mark.parametrize("name", OFFLINE)
def test_examples_are_right_and_calculated(name: str) -> None:
    task = make_task(name, "train", size=150)
    assert (task.name, len(task)) == (name, 150)
    for index in range(150):
        *question, answer = task.example(index)
        assert question == task.question(index)
        content = answer["content"]
        if isinstance(content, str):
            text = content
        else:
            expression, result, last = (part["text"] for part in content)
            assert calculate(expression) == result
            text = last
        assert task.grade(index, f" {text}\n")
        assert not task.grade(index, text + "0")
        render_conversation(TOK, [*question, answer])


@pytest.mark.parametrize(
    ("question", "expression"),
    [
        ("Solve for b: 4465*b = 178600", "178600 // 4465"),
        ("Solve for h: 20*h + 65 = 1485", "(1485 - 65) // 20"),
        ("Solve for z: 34*z - 1190 = 2040", "(2040 + 1190) // 34"),
        ("Solve for e: 56 - 98*e = -1218", "(1218 + 56) // 98"),
        ("Find the value of q in the equation: -40*q - 7 = -87", "(87 - 7) // 40"),
        ("Solve for k: k - 9 = 4", "4 + 9"),
    ],
)
def test_equations_are_solved_by_the_calculator(question: str, expression: str) -> None:
    (call, _, _) = KINDS["simple_equations"].solve(question, "0")
    assert call["text"] == expression


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_splits_never_share_a_question(name: str) -> None:
    questions = {}
    size = 100 if name == "simple_equations" else 300  # its source takes 5 ms for each
    for split in ("train", "val", "test"):
        task = make_task(name, split, size=size, seed=5)
        questions[split] = [task.question(i)[-1]["content"] for i in range(len(task))]
    assert not set(questions["train"]) & set(questions["test"])
    assert not set(questions["train"]) & set(questions["val"])
    assert not set(questions["val"]) & set(questions["test"])
    # Another seed, as the measurement uses, does not leak either.
    other = make_task(name, "test", size=size, seed=1)
    other_questions = {other.question(i)[-1]["content"] for i in range(len(other))}
    assert not set(questions["train"]) & other_questions
    if name not in ("identity", "limits", "dialogue", "follow_ups"):
        assert len(other_questions) == len(other)


def test_no_word_of_a_split_s_leads_is_in_another_s() -> None:
    """What a held-out lead measures is that the model reads past a word that it has not seen."""
    words = {
        split: {word for lead in leads for word in re.findall(r"\w+", lead.lower())}
        for split, leads in LEADS.items()
    }
    assert not words["train"] & words["val"]
    assert not words["train"] & words["test"]
    assert not words["val"] & words["test"]


@pytest.mark.parametrize("name", ["identity", "limits"])
def test_every_second_training_question_has_a_lead(name: str) -> None:
    leads = {lead.lower() for lead in LEADS["train"]} - {""}
    task = make_task(name, "train", size=2000)
    questions = [task.question(index)[-1]["content"].lower() for index in range(2000)]
    counts = {lead: sum(text.startswith(lead) for text in questions) for lead in leads}
    assert min(counts.values()) > 0
    # Six standard deviations of a binomial count are 134.
    assert abs(sum(counts.values()) - 1000) < 134


def test_spoken_sums_never_ask_a_test_sum_of_chain_sum() -> None:
    train, test = (
        make_task("spoken_sums", "train", size=2000),
        make_task("chain_sum", "test", size=200),
    )
    sums = {train.example(i)[1]["content"][0]["text"] for i in range(2000)}
    assert not sums & {test.example(i)[1]["content"][0]["text"] for i in range(200)}


def test_spoken_questions_have_their_terms_in_order() -> None:
    """Read back by hand-written rules, in every way of asking: \"subtract 3 from 5\" is 5 - 3."""
    signs = {"plus": "+", "minus": "-", "times": "*", "x": "*", "×": "*", "÷": "/", ":": "/"}
    assert spoken.NUMBER_WORDS[13] == "thirteen"
    values = {word: number for number, word in enumerate(spoken.NUMBER_WORDS)}
    forms = set()
    for name in ("spoken_sums", "spoken_products", "spoken_quotients"):
        task = make_task(name, "train", size=1500)
        for index in range(len(task)):
            question, answer = task.example(index)
            text, expression = question["content"], answer["content"][0]["text"]
            words = re.findall(r"\d+|[a-z]+-?[a-z]+", text.lower())
            terms = [
                int(values.get(word, word)) for word in words if word.isdigit() or word in values
            ]
            reference = [int(term) for term in expression.split()[::2]]
            if re.search("(?i)subtract|take .* away|go into", text) and "take away" not in text:
                terms.reverse()
            assert terms == reference, text
            written_signs = [
                signs.get(s, s) for s in re.findall(r"\b(?:plus|minus|times|x)\b|[-+*/×÷:]", text)
            ]
            forms.add(re.sub(r"\d+", "#", text))
            if len(written_signs) == len(reference) - 1 and "-" not in "".join(words):
                assert written_signs == expression.split()[1::2], text
    assert len(forms) > 200


def test_one_animal_has_an_article() -> None:
    task = make_task("spoken_legs", "train", size=120)
    ones = [task.question(index)[0]["content"] for index in range(0, 120, spoken.ONE_IN)]
    assert all(re.search(r" (a [^aeiou]|an [aeiou])", text) for text in ones)
    assert task.grade(0, task.example(0)[1]["content"][-1]["text"])


def test_a_follow_up_begins_with_the_result_before_it() -> None:
    task = make_task("follow_ups", "test", size=50)
    for index in range(50):
        (_, first, _, second) = task.example(index)
        assert second["content"][0]["text"].startswith(first["content"][-1]["text"] + " ")


@pytest.mark.parametrize("name", ["follow_ups", "dialogue"])
def test_answers_sent_back_are_not_trained_on(name: str) -> None:
    """Else the model would learn to answer without the calculator."""
    task = make_task(name, "train", size=60)
    for index in range(60):
        *before, last = task.example(index)
        calculations = [m["content"] for m in before if isinstance(m["content"], list)]
        if index % 2:
            assert all(len(parts) == 1 and parts[0]["weight"] == 0 for parts in calculations)
        elif name == "follow_ups":
            assert [len(parts) for parts in calculations] == [3]
        ids, mask = render_conversation(TOK, [*before, last])
        learned_text = TOK.decode(
            [token for token, weight in zip(ids, mask, strict=True) if weight]
        )
        if name == "follow_ups" and index % 2:
            call, _, text = (part["text"] for part in last["content"])
            assert learned_text == f"<|python_start|>{call}<|python_end|>{text}<|assistant_end|>"


def test_stories_never_have_less_than_nothing() -> None:
    task = make_task("stories", "train", size=300)
    expressions = [task.example(i)[1]["content"][0]["text"] for i in range(300)]
    assert all(int(calculate(text) or "-1") >= 0 for text in expressions)
    assert {text.split()[1] for text in expressions} == {"+", "-", "*"}


def test_people_type_with_and_without_marks() -> None:
    texts = {vary(random.Random(seed), "Who are you?") for seed in range(60)}
    assert texts == {"Who are you?", "who are you?", "Who are you", "who are you"}
    assert {vary(random.Random(seed), "?") for seed in range(20)} == {"?"}


def test_equal_arguments_give_equal_examples() -> None:
    for name in OFFLINE:
        one, two = (make_task(name, "train", size=20, seed=3) for _ in range(2))
        assert [one.example(i) for i in range(20)] == [two.example(i) for i in range(20)]


@pytest.mark.parametrize("name", list(KINDS))
def test_reasoning_gym_itself_agrees(name: str) -> None:
    kind = KINDS[name]
    source = reasoning_gym.create_dataset(kind.dataset, seed=9, size=50, **kind.config)
    for item in source:
        content = kind.solve(item["question"], item["answer"])
        text = content if isinstance(content, str) else content[-1]["text"]
        assert source.score_answer(text, item) == 1.0


def test_the_default_mixture_is_offline_and_known() -> None:
    assert {entry.split(":")[0] for entry in DEFAULT_MIXTURE} <= set(OFFLINE) <= set(names())
    with pytest.raises(
        ValueError, match=r"task='nothing' is not known: one of chain_sum, dialogue"
    ):
        make_task("nothing", "train")


ROWS = {
    "smoltalk": {
        "messages": [
            {"role": "user", "content": "Hi", "extra": 1},
            {"role": "assistant", "content": "Hello."},
        ]
    },
    "mmlu": {"question": "2+2?", "choices": ["1", "2", "3", "4"], "answer": 3},
    "gsm8k": {
        "question": "Six bags of 12?",
        "answer": "There are 6*12=<<6*12=72>>72 in all.\n#### 72",
    },
}


@pytest.mark.parametrize("name", hub.NAMES)
def test_hub_rows_become_conversations(name: str) -> None:
    task = hub.HubTask(name, "train", 5, 0, data=[ROWS[name]])
    assert len(task) == 1
    question, answer = task.example(0)
    assert (question["role"], answer["role"]) == ("user", "assistant")
    render_conversation(TOK, [question, answer])
    right = {"smoltalk": "Hello.", "mmlu": "D", "gsm8k": "so\n#### 72"}[name]
    assert task.grade(0, right)
    assert not task.grade(0, "####")
    if name == "gsm8k":
        assert [part["type"] for part in answer["content"]] == [
            *("text", "python", "python_output", "text")
        ]
        assert calculate(answer["content"][1]["text"]) == answer["content"][2]["text"]


class _Rows(list):
    def shuffle(self, seed: int) -> _Rows:
        return _Rows(random.Random(seed).sample(self, len(self)))


def _hub_row(name: str, split: str, number: int) -> dict:
    text = f"{split} {number % 500}?"  # every question of the first 500 comes twice
    answer = {"role": "assistant", "content": "x"}
    return {
        "smoltalk": {"messages": [{"role": "user", "content": text}, answer]},
        "mmlu": {"question": text, "choices": ["1", "2", "3", "4"], "answer": 3},
        "gsm8k": {"question": text, "answer": "x\n#### 1"},
    }[name]


@pytest.mark.parametrize("name", hub.NAMES)
def test_hub_validation_never_sees_the_test_split(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import datasets

    def load(path: str, config: str | None, *, split: str) -> _Rows:
        return _Rows(_hub_row(name, split, number) for number in range(700))

    monkeypatch.setattr(datasets, "load_dataset", load)
    questions = {}
    for split in ("train", "val", "test"):
        task = make_task(name, split, seed=3)
        questions[split] = {task.question(i)[-1]["content"] for i in range(len(task))}
        few = make_task(name, split, size=5, seed=3)
        assert [few.example(i) for i in range(5)] == [task.example(i) for i in range(5)]
    assert questions["train"]
    assert questions["val"]
    assert not questions["train"] & questions["val"]
    for split in ("train", "val"):
        assert not questions[split] & questions["test"]
        assert not any("test" in question for question in questions[split])
    assert all("test " in question for question in questions["test"])


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"task='mmlu' cannot be loaded from the Hub .*no network"):
        make_task("mmlu", "train")


def test_options_set_the_difficulty() -> None:
    task = make_task("chain_sum,min_terms=4,max_terms=4", "test", size=5)
    assert task.name == "chain_sum,min_terms=4,max_terms=4"
    for index in range(5):
        question, answer = task.example(index)
        expression = answer["content"][0]["text"]
        assert len(re.findall(r"[+-] ", expression)) == 3
        assert expression in question["content"]
    other = make_task("basic_arithmetic,min_terms=2,max_terms=2", "test", size=3)
    assert other.grade(0, f" {other.example(0)[1]['content']}\n")


class Halves:
    """No task: it has no questions. Grades with what it is made of."""

    def __init__(self, split: str, size: int | None, seed: int, grade: Any = 0.5):
        self.name, self._grade = "halves", grade

    def __len__(self) -> int:
        return 3

    def grade(self, index: int, answer: str) -> Any:
        return self._grade() if callable(self._grade) else self._grade


@pytest.mark.parametrize(
    ("grade", "golden"), [(True, 1.0), (0.5, 0.5), (np.float32(0.25), 0.25), (np.False_, 0.0)]
)
def test_a_grade_is_a_number(grade: Any, golden: float) -> None:
    reward = grade_answer(Halves("train", 3, 0, grade), 1, "text")  # type: ignore[arg-type]
    assert (type(reward), reward) == (float, golden)


@pytest.mark.parametrize("grade", [None, "yes", math.nan, [1]])
def test_any_other_grade_is_an_error(grade: Any) -> None:
    message = "task='halves' graded 'text' to question 1 with .*: a bool or a finite number"
    with pytest.raises(ValueError, match=message):
        grade_answer(Halves("train", 3, 0, grade), 1, "text")  # type: ignore[arg-type]


def test_what_a_grader_raises_names_the_answer() -> None:
    def grade() -> bool:
        raise KeyError("x")

    with pytest.raises(KeyError) as error:
        grade_answer(Halves("train", 3, 0, grade), 1, "text")  # type: ignore[arg-type]
    assert error.value.__notes__ == ["raised by task='halves' as it graded 'text' to question 1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chain_sum,min_terms", "options behind a name are key=value"),
        ("chain_sum,colour=3", "unknown or wrong option.*colour"),
        ("chain_sum,min_terms=4,max_terms=2", "cannot have the options"),
        ("no.such.Task", "cannot be imported"),
        ("tests.rl.tiny_rl.EvenFirst,size=3", "it takes .* its own options: multiple values"),
        ("chain_sum,min_terms=abc", "unknown or wrong option"),
        ("tests.rl.tiny_rl.TASK", "not allowed: a class or function that takes"),
        ("tests.rl.tiny_rl.FakeEngine", "it takes .* its own options: too many"),
        ("tests.tasks.test_tasks.Halves", "which also has question, example"),
    ],
)
def test_wrong_options_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, "train", size=3)


def test_an_own_task_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed command is called: its own folder is on the path, the current one is not."""
    source = "from tests.rl.tiny_rl import EvenFirst as Mine\n"
    (tmp_path / "own_tasks_of_a_test.py").write_text(source)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    assert len(make_task("own_tasks_of_a_test.Mine", "train", size=3)) == 3
    assert sys.path.count(str(tmp_path)) == 1
    make_task("own_tasks_of_a_test.Mine", "train", size=3)
    assert sys.path.count(str(tmp_path)) == 1


OWN = """
import json

class Mine:
    def __init__(self, split, size, seed, fails=""):
        self.fails = fails
        self.run("init")
    def run(self, name):
        if name == self.fails:
            json.loads("x")
    def __len__(self):
        self.run("len")
        return 1
    def question(self, index):
        self.run("question")
    def example(self, index):
        self.run("example")
    def grade(self, index, answer):
        return int(answer)
"""


@pytest.mark.parametrize(
    ("fails", "event"),
    [
        ("init", "cannot be created: JSONDecodeError: Expecting value"),
        ("len", "failed in __len__(): JSONDecodeError: Expecting value"),
        ("question", "failed in question(0): JSONDecodeError: Expecting value"),
        ("example", "failed in example(0): JSONDecodeError: Expecting value"),
        ("grade", "failed in grade(0, 'two'): ValueError: invalid literal for int()"),
    ],
)
def test_what_an_own_task_raises_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, event: str
) -> None:
    (tmp_path / "failing_tasks_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"failing_tasks_of_a_test.Mine,fails={fails}"
    with pytest.raises(ValueError, match=re.escape(f"task={name!r} {event}")) as error:
        _use(name)
    assert re.search(r"failing_tasks_of_a_test.py, line [0-9]+\)$", str(error.value))


def _use(name: str) -> None:
    """Each call of a task with one question."""
    task = make_task(name, "train")
    for index in range(len(task)):
        task.question(index)
        task.example(index)
        grade_answer(task, index, "two")


def test_a_late_grade_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    event = threading.Event()
    monkeypatch.setattr(own, "SLOW_S", 0.01)
    monkeypatch.setattr(own.logger, "warning", lambda text: (warnings.append(text), event.set()))
    task = OwnTask(Halves("train", 3, 0, lambda: event.wait(60)), "mine")  # type: ignore[arg-type]
    assert grade_answer(task, 1, "text") == 1
    assert warnings == ["task='mine' has not returned from grade(1, 'text') after 0.01 s"]


def test_an_own_task_is_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that figures of another grader are not taken for this one's."""
    digests = set()
    monkeypatch.syspath_prepend(tmp_path)
    for i in range(2):
        file = tmp_path / "graders_of_a_test.py"
        file.write_text(f"from tests.rl.tiny_rl import EvenFirst\nclass Mine(EvenFirst): x = {i}\n")
        task = make_task("graders_of_a_test.Mine", "train")
        assert isinstance(task, OwnTask)
        digests.add(task.source_digest())
    assert len(digests) == 2


@pytest.mark.parametrize("source", ["x = (", "1 / 0", "import no_such_module"])
def test_an_own_module_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    (tmp_path / "failing_module_of_a_test.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    message = r"^task='failing_module_of_a_test.Mine' cannot be imported: .*Error: .* line 1"
    with pytest.raises(ValueError, match=message):
        make_task("failing_module_of_a_test.Mine", "train")


def test_own_task_by_import_path() -> None:
    task = make_task("tests.rl.tiny_rl.EvenFirst,extra=x", "val", size=3)
    assert (len(task), task.question(1)[0]["content"]) == (3, "vax 1")


@pytest.mark.parametrize("layout", ["{}.jsonl", "main/{}-00000-of-00001.parquet"])
def test_gsm8k_from_a_folder(tmp_path: Path, layout: str) -> None:
    for split in ("train", "test"):
        rows = [_hub_row("gsm8k", split, number) for number in range(40)]
        file = tmp_path / layout.format(split)
        file.parent.mkdir(exist_ok=True)
        if layout.endswith("jsonl"):
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), file)
    task = make_task(f"gsm8k,path={tmp_path}", "test", seed=3)
    texts = [task.question(i)[0]["content"] for i in range(len(task))]
    assert sorted(texts) == sorted(f"test {n}?" for n in range(40))
    assert task.grade(0, "so it is #### 1")
    (tmp_path / layout.format("test")).unlink()
    with pytest.raises(ValueError, match="has no file of the split test"):
        make_task(f"gsm8k,path={tmp_path}", "test")


@pytest.mark.parametrize("name", hub.NAMES)
def test_a_row_of_other_fields_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"q": "1 + 1", "answer": 3}\n')
    task = make_task(f"{name},path={tmp_path}", "test")
    with pytest.raises(ValueError, match=rf"^task='{name},.*'q': '1 \+ 1'.* fields are not those"):
        task.question(0)


def test_spoken_legs_by_hand() -> None:
    task = make_task("spoken_legs", "train", size=8)
    inner = make_task("leg_counting", "train", size=8, seed=1)
    for index in range(1, spoken.ONE_IN):
        text = inner.question(index)[0]["content"].rsplit("if you have ", 1)[1][:-1]
        animals = " and ".join(text.rsplit(", ", 1))
        assert animals in task.question(index)[0]["content"]
        assert task.example(index)[1] == inner.example(index)[1]


def test_limits_admit_what_is_out_of_reach() -> None:
    task = make_task("limits", "train", size=400)
    questions = {task.question(i)[0]["content"] for i in range(400)}
    assert len(questions) > 250
    assert not any("{" in question or "\n" in question for question in questions)
    for answer in (task.example(i)[1]["content"] for i in range(400)):
        assert any(phrase in answer for phrase in ("do not know", "more than I", "cannot answer"))
    assert not task.grade(0, "Paris.")


def test_dialogues_mix_tasks() -> None:
    task = make_task("dialogue", "train", size=200)
    lengths = {len(task.example(i)) // 2 for i in range(200)}
    assert lengths >= {2, 3, 4}
    kinds = {type(m["content"]) for i in range(200) for m in task.example(i)[1::2]}
    assert kinds == {str, list}
