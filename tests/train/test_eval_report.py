"""Evaluations on a run's page."""

from __future__ import annotations

import json

from nanochat_ray.storage import Store
from nanochat_ray.train import eval_report
from nanochat_ray.train.report import EVALS_END, EVALS_START, render

GSM8K = {"accuracy": 0.25, "total": 8, "interval": [0.0715, 0.5907], "pass@1": 0.25, "pass@4": 0.5}


def write(run: Store, step: int, accuracy: float) -> None:
    figures = {"weights": "w", "tasks": {"gsm8k": {**GSM8K, "accuracy": accuracy}}}
    run.child("evals").write_text(f"step-{step:06d}.json", json.dumps(figures))


def test_figures_of_every_checkpoint(root: Store) -> None:
    run = root.child("runs", "chat")
    assert eval_report.read_figures(run) == {}
    assert eval_report.section({}) == ""
    write(run, 20, 0.5)
    write(run, 3, 0.25)
    run.child("evals").write_text("step-000020.gsm8k.answers.json", "{}")
    run.child("evals").write_text("step-000021.json", "{")  # damaged
    figures = eval_report.read_figures(run)
    assert list(figures) == [3, 20]
    page = eval_report.section(figures)
    assert page.count("<svg") == 1
    assert page.count("<circle") == 2
    row = "<td>gsm8k</td><td>step 3</td><td>accuracy 0.2500</td>"
    assert f"{row}<td>95% interval 0.071 to 0.591</td><td>8 questions</td>" in page
    assert "pass@4 0.5000" in page
    assert "pass@1 " not in page
    assert "<svg" not in eval_report.section({3: figures[3]})  # one point is no curve


def test_the_page_keeps_the_rest(root: Store) -> None:
    run = root.child("runs", "chat")
    write(run, 3, 0.25)
    eval_report.update(run)  # a run without a page
    assert run.read_text("report.html").count("accuracy 0.2500") == 1
    page = render("chat", [], {}, about={"lr": 1}, hardware={"cpu": "x"}, evals="old")
    for text in (page, page.replace(f"{EVALS_START}old{EVALS_END}", "")):
        run.write_text("report.html", text)
        for accuracy in (0.5, 0.75):
            write(run, 3, accuracy)
            eval_report.update(run)
            result = run.read_text("report.html")
            assert f"accuracy {accuracy:.4f}" in result
            assert result.count("<h2>Evaluations</h2>") == 1
            assert "old" not in result
            assert result.endswith("</html>\n")
            assert "<h2>Hardware</h2>" in result
