"""One way to reach Ray for every job."""

from __future__ import annotations

import logging
import os
import secrets

import ray
import ray.data


def connect() -> None:
    """Joins the cluster that this process was submitted to or RAY_ADDRESS names, else starts one.

    A cluster of its own lasts as long as the process and has at least 8 logical CPUs, since tasks
    of Ray Data must find a place beside training workers. Its ports bind every interface, so they
    want a token (``RAY_AUTH_MODE``), which this process has and those that it starts. Raises
    ValueError or ConnectionError if the cluster that is named cannot be joined.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "")
        if address.startswith("http"):
            raise ValueError(
                f"RAY_ADDRESS={address!r} is a dashboard, which takes submitted jobs only: "
                "use ray job submit, or give host:port of the head node"
            )
        if address or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
            ray.init(address="auto", logging_level=logging.WARNING)
        else:
            # Ray turns tokens on by itself; one that it makes would lie in a file for all to read.
            if os.environ.get("RAY_AUTH_MODE", "token") == "token":
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(
                address="local",
                num_cpus=max(8, os.cpu_count() or 1),
                object_store_memory=500 << 20,
                include_dashboard=False,
                logging_level=logging.WARNING,
            )
    quiet_data()


def quiet_data() -> None:
    """Ray Data's bars and plan dumps do not belong into the log of a job."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Only errors: that its bars are off is a warning to it.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
