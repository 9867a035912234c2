"""What ``bench rolls`` counts, as a table and a list of failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.bench import chart, load
from nanochat_ray.bench.checkpoint_writer import REASONS
from nanochat_ray.bench.http_stream import Result


@dataclass(frozen=True)
class Answer:
    """One answer to the prompt ``index``."""

    index: int
    result: Result


@dataclass(frozen=True)
class Roll:
    """A checkpoint that was rolled out; times are of ``time.perf_counter``."""

    checkpoint: str
    published_at: float
    served_at: float
    """When every engine served it."""
    is_served: bool
    """False: not in time."""

    @property
    def seconds(self) -> float:
        return self.served_at - self.published_at


@dataclass(frozen=True)
class BadCheckpoint:
    """A checkpoint that must be refused."""

    kind: str
    name: str
    reason: str
    """Why it is refused; "": it is not."""
    is_old_served: bool
    """Whether the endpoint still served the checkpoint before it."""

    @property
    def is_refused(self) -> bool:
        return REASONS[self.kind] in self.reason


@dataclass
class Report:
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Of undisturbed answers, by the digits of the weights that a fingerprint ends with."""
    rolls: list[Roll] = field(default_factory=list)
    bad: list[BadCheckpoint] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def is_changed(self, answer: Answer) -> bool:
        """Whether its text is not that of the checkpoint that it names, or it names none."""
        result = answer.result
        if result.error or len(result.fingerprints) > 1:
            return False
        digest = "".join(result.fingerprints).rpartition("-")[2]
        return self.texts.get(digest, [])[answer.index : answer.index + 1] != [result.text]

    def _is_in_roll(self, answer: Answer) -> bool:
        began = answer.result.began
        return any(roll.published_at <= began <= roll.served_at for roll in self.rolls)

    def first_tokens_s(self, is_in_roll: bool) -> list[float]:
        """Of answers that began in a roll, or else of those that did not."""
        return [
            answer.result.first_s
            for answer in self.answers
            if not answer.result.error and self._is_in_roll(answer) == is_in_roll
        ]

    def count(self, condition: Callable[[Answer], bool]) -> int:
        return sum(map(condition, self.answers))

    def figures(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "answers": len(self.answers),
            "failed": self.count(lambda a: bool(a.result.error)),
            "two_checkpoints": self.count(lambda a: len(a.result.fingerprints) > 1),
            "changed": self.count(self.is_changed),
            "errors": sorted({a.result.error[:200] for a in self.answers if a.result.error}),
        }
        for name, is_in_roll in (("beside_rolls", False), ("in_rolls", True)):
            times = self.first_tokens_s(is_in_roll)
            for share in (50, 99):
                values[f"first_token_{name}_p{share}_s"] = load.percentile(times, share / 100)
        return values


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f}" if other else "-"


def table(report: Report) -> str:
    figures = report.figures()
    seconds = [roll.seconds for roll in report.rolls]
    head = ["rolls", "answers", "failed", "two checkpoints", "changed"]
    cells = [str(len(report.rolls))]
    cells += [str(figures[k]) for k in ("answers", "failed", "two_checkpoints", "changed")]
    head += ["published → served p50 / max (s)"]
    cells += [f"{load.percentile(seconds, 0.5):.2f} / {max(seconds, default=0.0):.2f}"]
    for share in (50, 99):
        beside, inside = (
            figures[f"first_token_{name}_p{share}_s"] for name in ("beside_rolls", "in_rolls")
        )
        head += [f"first token p{share}: without, in a roll (s), ratio"]
        cells += [f"{beside:.3f}, {inside:.3f}, {_ratio(inside, beside)}"]
    text = chart.markdown(head, cells)
    rows = []
    for kind in dict.fromkeys(bad.kind for bad in report.bad):
        group = [bad for bad in report.bad if bad.kind == kind]
        rows.append([kind, *map(str, (len(group), *_sums(group)))])
    if rows:
        head = ["bad checkpoint", "number", "refused by name", "old one served"]
        text += "\n\n" + chart.markdown(head, *rows)
    return text


def _sums(group: Sequence[BadCheckpoint]) -> tuple[int, int]:
    return sum(bad.is_refused for bad in group), sum(bad.is_old_served for bad in group)


def failures(report: Report) -> list[str]:
    """What should not have happened."""
    figures = report.figures()
    texts = [f"{figures['failed']} answers failed: {'; '.join(figures['errors'])}"]
    texts = texts if figures["failed"] else []
    if figures["two_checkpoints"]:
        texts.append(f"{figures['two_checkpoints']} answers name two checkpoints")
    if figures["changed"]:
        count = figures["changed"]
        texts.append(f"{count} answers name no checkpoint, or have another text than it gives")
    texts += [f"{r.checkpoint} was not served in time" for r in report.rolls if not r.is_served]
    for bad in report.bad:
        if not bad.is_refused:
            texts.append(f"{bad.name} ({bad.kind}) was not refused: {bad.reason or 'no reason'}")
        if not bad.is_old_served:
            texts.append(f"{bad.name} ({bad.kind}): the checkpoint before it was not served")
    return texts
