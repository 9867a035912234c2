"""What ``bench overload`` measured, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nanochat_ray.bench import chart


@dataclass
class Flood:
    """What clients saw of an open loop."""

    num_offered: int = 0
    num_admitted: int = 0
    num_refused: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Other ends, by their reason."""
    without_retry_after: int = 0
    capacity_per_s: float = 0.0
    offered_per_s: float = 0.0
    usual_first_token_s: float = 0.0
    first_token_p50_s: float = 0.0
    first_token_p99_s: float = 0.0
    refusal_p50_s: float = 0.0
    refusal_p99_s: float = 0.0
    tokens_per_s: float = 0.0
    """Of admitted requests, until the last of them was complete."""
    send_delay_p99_s: float = 0.0
    """By which this program sent a request late: more than a little, and it measures itself."""
    recovery_s: float | None = None
    """From the last arrival until a first token takes as long as usual; None: not in time."""
    rss_idle_mib: float = 0.0
    """Before the server had any load."""
    rss_before_mib: float = 0.0
    rss_peak_mib: float = 0.0
    rss_after_mib: float = 0.0


@dataclass
class AttackReport:
    """What became of an attack's connections and of the requests beside it."""

    name: str
    outcomes: Counter[str]
    answers: int
    refused_answers: int
    """429 or 503 with Retry-After: an attack that asks for answers may fill the queues."""
    failed_answers: int
    first_token_p50_s: float
    first_token_p99_s: float
    recovery_s: float | None
    """From the end of the attack, as in ``Flood``."""
    rss_before_mib: float
    rss_peak_mib: float
    rss_after_mib: float


def seconds_text(value: float | None) -> str:
    return "never" if value is None else f"{value:.3f}"


def flood_table(report: Flood) -> str:
    cells: Mapping[str, str] = {
        "offered": str(report.num_offered),
        "admitted": str(report.num_admitted),
        "refused": str(report.num_refused),
        "failed": str(report.failures.total()),
        "first token p50 / p99 (s)": (
            f"{report.first_token_p50_s:.3f} / {report.first_token_p99_s:.3f}"
        ),
        "refusal p50 / p99 (s)": f"{report.refusal_p50_s:.3f} / {report.refusal_p99_s:.3f}",
        "recovery (s)": seconds_text(report.recovery_s),
        "RSS idle / before / peak / after (MiB)": f"{report.rss_idle_mib:.0f} / {_rss(report)}",
        "sent late p99 (s)": f"{report.send_delay_p99_s:.3f}",
    }
    return chart.markdown(list(cells), list(cells.values()))


def attack_table(attacks: Sequence[AttackReport]) -> str:
    head = ["attack", "its connections", "answers", "refused", "failed"]
    head += ["first token p50 / p99 (s)", "recovery (s)", "RSS before / peak / after (MiB)"]
    lines = [
        [
            attack.name,
            ", ".join(f"{count} {outcome}" for outcome, count in attack.outcomes.most_common()),
            str(attack.answers),
            str(attack.refused_answers),
            str(attack.failed_answers),
            f"{attack.first_token_p50_s:.3f} / {attack.first_token_p99_s:.3f}",
            seconds_text(attack.recovery_s),
            _rss(attack),
        ]
        for attack in attacks
    ]
    return chart.markdown(head, *lines)


def _rss(report: Flood | AttackReport) -> str:
    return f"{report.rss_before_mib:.0f} / {report.rss_peak_mib:.0f} / {report.rss_after_mib:.0f}"
