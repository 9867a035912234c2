"""End what ``nanochat-ray quickstart`` started on a port, and nothing else.

    nanochat-ray stop --port 8000

Datasets, checkpoints and logs stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat_ray.checks import check_port


@dataclass(frozen=True, kw_only=True)
class Args:
    port: int = 8000
    """Port of the endpoint."""

    def __post_init__(self) -> None:
        check_port("port", self.port)


def main(args: Args) -> None:
    from nanochat_ray.on_ray.local_cluster import LocalCluster, print_step

    cluster = LocalCluster(args.port)
    count = cluster.stop()
    text = f"stopped {count} processes of" if count else "nothing runs for"
    print_step(f"{text} port {args.port}")
