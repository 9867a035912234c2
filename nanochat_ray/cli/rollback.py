"""Return an endpoint that follows its run to the checkpoint before, and keep it there.

    nanochat-ray rollback --run chat              # to the checkpoint that was served before
    nanochat-ray rollback --run chat --to step-000200
    nanochat-ray rollback --run chat --resume     # follow the run again

The endpoint is one that was started with nanochat-ray serve --follow.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nanochat_ray.checks import check_float, check_name, require
from nanochat_ray.storage import Store, absolute, default_root

POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds the runs."""
    run: str = "chat"
    """Name of the run."""
    name: str = ""
    """The endpoint's model name, if it is not that of the run."""
    to: str = ""
    """Checkpoint to serve; by default the one that was served before."""
    resume: bool = False
    """End a rollback: follow the run again."""
    wait_s: float = 60.0
    """Seconds to wait until the checkpoint is served; 0: none."""

    def __post_init__(self) -> None:
        check_name("run", self.run)
        if self.to:
            check_name("to", self.to)
        check_float("wait_s", self.wait_s)
        object.__setattr__(self, "storage", absolute(self.storage))
        require(not (self.to and self.resume), "to", self.to, "nothing beside --resume")


def main(args: Args) -> None:
    from nanochat_ray.checkpoint import follow

    run, name = Store.at(args.storage).child("runs", args.run), args.name or args.run
    if not follow.served_checkpoint(run, name):
        raise ValueError(f"no endpoint {name!r} follows run {run.uri}: start serve with --follow")
    if args.resume:
        follow.unpin(run, name)
        print(f"{name} follows {args.run} again")
        return
    target = args.to or _previous(run, name)
    follow.pin(run, name, target)
    print(f"{name} is pinned to {target}; --resume ends that", flush=True)
    deadline = time.monotonic() + args.wait_s
    while args.wait_s and follow.served_checkpoint(run, name) != target:
        if time.monotonic() > deadline:
            raise ValueError(
                f"{name} does not serve {target} after {args.wait_s:g} s: does it run? /health "
                "says what is refused"
            )
        time.sleep(POLL_S)
    if args.wait_s:
        print(f"{name} serves {target}")


def _previous(run: Store, name: str) -> str:
    """The checkpoint that was served before. Raises ValueError if there is none."""
    from nanochat_ray.checkpoint import follow

    if (pin := follow.read_pin(run, name)) is not None:
        raise ValueError(f"{name} is pinned to {pin} already: --to names another checkpoint")
    previous = follow.previous_checkpoint(run, name)
    if not previous:
        raise ValueError(f"{name} has served no checkpoint before: --to names one")
    return previous
