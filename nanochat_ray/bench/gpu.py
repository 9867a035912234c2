"""Whether a GPU computes what the CPU does, and how fast: ``nanochat-ray bench gpu``.

    nanochat-ray bench gpu --part check                        # equalities
    nanochat-ray bench gpu --part train                        # ms of a step, MFU, memory
    nanochat-ray bench gpu --part serve                        # decode, prefill, weight swaps
    nanochat-ray bench gpu --part nanochat --checkout FOLDER   # nanochat's step beside ours
    nanochat-ray bench gpu --part all --max-seconds 540        # of all, what is worth most first
    python -m nanochat_ray.bench.gpu check                     # the same, with torch and numpy only

Each part is meant to take less than 10 minutes on an H100, its most valuable figures first. An
error ends only its own line. The status is 1 if a check failed; ``--out`` gets all figures as JSON,
as far as there are any.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nanochat_ray.bench.gpu_report import Report, replace_missing_packages
from nanochat_ray.checks import check_int, require

Part = Literal["check", "train", "serve", "nanochat", "all"]
VALUE: tuple[tuple[Part, str], ...] = (
    *(("check", "fused forward"), ("check", "engine"), ("nanochat", "d12")),
    *(("train", "d12 × 32 compile"), ("serve", "d12 graphs"), ("serve", "d12 B=1 ")),
    *(("serve", "d12 B=256"), ("nanochat", "d20"), ("train", "d20 × 16 compile")),
    *(("serve", "d12"), ("check", ""), ("serve", ""), ("train", ""), ("nanochat", "")),
)
"""The order of "all": parts, and what their names contain."""


@dataclass(frozen=True, kw_only=True)
class Args:
    part: Part = "check"
    """What to run; "all" is everything, in the order of its value."""
    checkout: str = ""
    """Folder of nanochat, for the part of that name; without it, "all" leaves that out."""
    max_seconds: int = 0
    """Nothing begins later than this; 0: no limit."""
    quick: bool = False
    """Sizes that only show whether it runs; the figures mean nothing."""
    match: str = ""
    """Only what has this in its name, such as "d12", "swap" or "gradients"; not with "all"."""
    out: str = ""
    """File for the figures, as JSON."""

    def __post_init__(self) -> None:
        require(self.part in get_args(Part), "part", self.part, " or ".join(get_args(Part)))
        check_int("max_seconds", self.max_seconds, 0)
        require(not self.match or self.part != "all", "match", self.match, "empty with part all")
        if self.part == "nanochat" or (self.part == "all" and self.checkout):
            is_checkout = (Path(self.checkout) / "nanochat" / "gpt.py").exists()
            require(is_checkout, "checkout", self.checkout, "a folder with nanochat/gpt.py")


def main(args: Args) -> int:
    import torch

    if not torch.cuda.is_available():
        print("bench gpu: this machine has no CUDA device")
        return 2
    path = Path(args.out) if args.out else None
    report = Report(match=args.match, max_seconds=args.max_seconds, path=path)
    capability = torch.cuda.get_device_capability()
    report.note("torch", torch.__version__)
    report.note("device", f"{torch.cuda.get_device_name()}, capability {capability}")
    if args.part == "all":
        run_all(report, args)
    else:
        run_part(args.part, report, args)
    report.write()
    print(f"{len(report.failures)} failures: {', '.join(report.failures) or 'none'}")
    return 1 if report.failures else 0


def run_all(report: Report, args: Args) -> None:
    """Every part, in the order of ``VALUE``; that of nanochat only with a checkout."""
    for part, name in VALUE:
        if part != "nanochat" or args.checkout:
            report.match = name
            run_part(part, report, args)


def run_part(part: Part, report: Report, args: Args) -> None:
    """What the report selects of one part, which is not "all"."""
    from nanochat_ray.bench import gpu_checks, gpu_serve, gpu_train

    if part == "check":
        gpu_checks.run(report)
    elif part == "train":
        gpu_train.run(report, args.quick)
    elif part == "serve":
        gpu_serve.run(report, args.quick)
    else:
        turns = 1 if args.part == "all" else 2
        gpu_train.compare(report, args.checkout, args.quick, turns)


if __name__ == "__main__":
    replace_missing_packages()
    parser = argparse.ArgumentParser(prog="python -m nanochat_ray.bench.gpu")
    parser.add_argument("part", choices=get_args(Part))
    parser.add_argument("--checkout", default="", help="folder of nanochat")
    parser.add_argument("--quick", action="store_true", help="sizes that only show whether it runs")
    parser.add_argument("--match", default="", help="only what has this in its name")
    parser.add_argument("--max-seconds", type=int, default=0, help="nothing begins later")
    parser.add_argument("--out", default="", help="file for the figures, as JSON")
    raise SystemExit(main(Args(**vars(parser.parse_args()))))
