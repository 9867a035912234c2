"""The command line: ``nanochat-ray COMMAND``, one file per command.

Every file has ``Args``, the flags as a dataclass, and ``main(args)``. A command's file is imported
when it is run, so that ``nanochat-ray --help`` needs neither torch nor Ray.
"""

from __future__ import annotations

import sys
from typing import NoReturn

COMMANDS = {
    "prepare": "make a dataset of text, or of conversations",
    "train": "train a base model, or fine-tune one to chat",
    "rl": "let a chat model learn from answers that a program grades",
    "serve": "serve a run with OpenAI's API and a chat page",
    "rollback": "return an endpoint that follows its run to an earlier checkpoint",
    "chat": "chat with an endpoint in the terminal",
    "eval": "measure a run on tasks, and its bits per byte of text",
    "export": "write or read Hugging Face's and nanochat's folders",
    "bench": "measure training and serving",
    "drill": "kill parts of a cluster under load, and report what clients saw",
    "drill-train": "kill parts of a training run, and compare the weights that it ends with",
    "quickstart": "from raw text to a chat answer over HTTP, all of the above",
    "stop": "end what quickstart started",
}
"""Command → what it does."""


def module_of(command: str) -> str:
    """Path of the module of a command."""
    # They measure.
    package = "nanochat_ray.bench" if command.startswith("drill") else __name__
    return f"{package}.{command.replace('-', '_')}"


def main(command: str = "") -> NoReturn:
    """Runs ``command``, by default the first argument, with the arguments that follow."""
    from nanochat_ray.cli import entry, proxies

    entry.open_standard_streams()
    entry.set_home()
    proxies.exempt_loopback()
    argv = [command, *sys.argv[1:]] if command else sys.argv[1:]
    entry.dispatch("nanochat-ray", COMMANDS, argv, module_of)
