"""Who runs next, without a model."""

from __future__ import annotations

from nanochat_ray.engine.request import Request
from nanochat_ray.engine.scheduler import Scheduler, Sequence


def sequence(name: str, length: int = 4, **fields: object) -> Sequence:
    request = Request(id=name, prompt=[1] * length, **fields)  # type: ignore[arg-type]
    return Sequence(request, [1] * length, seed=0, limit=99, prefill_until=length)


def scheduler(**fields: int) -> Scheduler:
    settings = {"slots": 2, "token_budget": 10, "prefill_chunk": 4, "max_waiting": 9} | fields
    return Scheduler(**settings)


def run(s: Scheduler) -> dict[str, int]:
    """One step: tokens by request; whoever is done with its prompt gets one more token."""
    chunks = s.plan()
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.computed += chunk.count
        if samples:
            chunk.sequence.tokens.append(1)
    s.check_integrity()
    return {chunk.sequence.request.id: chunk.count for chunk in chunks}


def test_decodes_come_first_and_long_prompts_do_not_hold_them_up() -> None:
    s = scheduler()
    s.add(sequence("short"))
    assert run(s) == {"short": 4}
    s.add(sequence("long", 30))
    assert run(s) == {"short": 1, "long": 4}
    s.remove(s.running[0])
    assert run(s) == {"long": 10}  # nobody waits for it: the whole budget


def test_several_prompts_share_a_step() -> None:
    s = scheduler(slots=3)
    for name in "abc":
        s.add(sequence(name))
    assert run(s) == {"a": 4, "b": 4, "c": 2}


def test_the_lowest_priority_number_goes_first_and_pushes_out() -> None:
    s = scheduler(slots=1)
    s.add(sequence("later", priority=5))
    assert run(s) == {"later": 4}
    s.add(sequence("same", priority=5))
    assert run(s) == {"later": 1}
    s.add(sequence("urgent", priority=1))
    assert run(s) == {"urgent": 4}
    assert s.preemptions == 1
    s.remove(s.running[0])
    assert run(s) == {"later": 6}  # all of it again, before "same", which came after it


def test_clients_take_turns() -> None:
    s = scheduler(slots=2)
    for i in range(4):
        s.add(sequence(f"many{i}", client="many"))
    s.add(sequence("one", client="one"))
    assert set(run(s)) == {"many0", "one"}
