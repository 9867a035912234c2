"""The one way into every command: flags, the command, and how it ends.

What a user can mend is one line on stderr, ``error: …``, and exit status 2: a wrong flag, a file or
folder that cannot be used, storage or a cluster that does not answer. A defect of the program keeps
its traceback and status 1. Ctrl-C is status 130, a reader of stdout that left (``| head``) 141.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nanochat_ray.cli.parse import parse

A = TypeVar("A")

USAGE, FAILED, INTERRUPTED, NO_READER = 2, 1, 130, 141
MAX_MESSAGE = 2000
"""Characters of the line on stderr."""


def open_standard_streams() -> None:
    """Opens those that are closed (``>&-``, as some supervisors of services do) on /dev/null. The
    next file that is opened would else get their number, and what a library prints."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.dup2(descriptor, number)
            if descriptor != number:
                os.close(descriptor)
            os.set_inheritable(number, True)
            stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", errors="replace")
            setattr(sys, name, stream)


def set_home() -> None:
    """Sets HOME for a user without a home, in this process and in those that it starts: to ``/``,
    as container runtimes do. Libraries, Ray Train among them, cannot be imported without one."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"


def dispatch(
    prog: str, commands: Mapping[str, str], argv: Sequence[str], module_of: Callable[[str], str]
) -> NoReturn:
    """Runs the command that ``argv`` begins with.

    ``commands`` is command → what it does, ``module_of`` gives the path of a command's module. A
    module with ``COMMANDS`` of its own has subcommands.
    """
    if not argv or argv[0] in ("-h", "--help"):
        with _flushed_stdout():
            print(_usage(prog, commands))
        sys.exit(0)
    name = argv[0]
    if name not in commands:
        _log(f"error: {prog} has no command {name!r:.80}: one of {', '.join(commands)}")
        sys.exit(USAGE)
    module = importlib.import_module(module_of(name))
    prog = f"{prog} {name}"
    if hasattr(module, "COMMANDS"):
        dispatch(prog, module.COMMANDS, argv[1:], module.module_of)
    run(module.main, module.Args, module.__doc__, argv[1:], prog)


def _usage(prog: str, commands: Mapping[str, str]) -> str:
    width = max(map(len, commands))
    lines = [f"usage: {prog} COMMAND [flags]", ""]
    lines += [f"  {name:<{width}}  {text}" for name, text in commands.items()]
    return "\n".join([*lines, "", f"{prog} COMMAND --help shows the flags of a command."])


def run(
    main: Callable[[A], int | None],
    args: type[A],
    description: str | None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> NoReturn:
    """Parses the flags into ``args``, runs ``main`` and ends the process with its status."""
    _leave(_status_of(lambda: main(parse(args, description, argv, prog))))


def _status_of(command: Callable[[], int | None]) -> int:
    try:
        with _flushed_stdout():
            status = command() or 0
    except KeyboardInterrupt:
        _log("interrupted")
        return INTERRUPTED
    except SystemExit as error:
        if isinstance(error.code, str):
            _log(error.code)
            return FAILED
        return error.code or 0
    except Exception as error:
        message = explain(error)
        if message is not None:
            _log(f"error: {message}")
            return FAILED if isinstance(_cause(error), FloatingPointError) else USAGE
        if not _has_ray():
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        return FAILED
    return status


def _leave(status: int) -> NoReturn:
    """Ends the process; with its Ray if it uses one, which may be gone or about to go."""
    if _has_ray():
        from nanochat_ray.on_ray import leave

        if status == INTERRUPTED:
            leave.leave(leave.interrupted_status(), shutdown=False)
        leave.leave(status)
    if _was_rank():
        # Now and then a thread of torch outlives the process group, and the interpreter's own end
        # aborts ("terminate called without an active exception").
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    sys.exit(status)


def _has_ray() -> bool:
    """Whether the command has joined or started a cluster. Ray is imported only if it is used."""
    session = sys.modules.get("nanochat_ray.on_ray.session")
    return session is not None and bool(session.has_connected())


def _was_rank() -> bool:
    """Whether this process was one of several ranks of torchrun."""
    train_run = sys.modules.get("nanochat_ray.cli.train_run")
    return train_run is not None and bool(train_run.has_joined_group)


@contextlib.contextmanager
def _flushed_stdout() -> Iterator[None]:
    """Flushes stdout behind the block, also behind a ``sys.exit`` of ``--help``; ends the process
    if its reader has left."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # An arrow, or what a model writes, ends no run whose terminal has another encoding.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush stdout once more, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(NO_READER)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def explain(error: BaseException) -> str | None:
    """One line for an error that a user can mend; None for a defect of the program."""
    cause = _cause(error)
    if not isinstance(cause, _input_errors()):
        return None
    return one_line(_text(cause))


def one_line(text: str) -> str:
    text = " ".join(text.split())
    half = MAX_MESSAGE // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"


def _input_errors() -> tuple[type[BaseException], ...]:
    """The kinds that are the input's or the machine's. Libraries count only if they are in use."""
    kinds: list[type[BaseException]] = [
        ValueError,  # ours name the flag or file; pyarrow's ArrowInvalid is one too
        OSError,
        FloatingPointError,  # a run that diverged
        ModuleNotFoundError,  # an optional package
    ]
    for module, names in (
        ("pyarrow", ("ArrowException",)),
        # Not RayError: a worker's own exception, which may be a defect, is one of those.
        (
            "ray.exceptions",
            (
                *("RaySystemError", "RpcError", "AuthenticationError", "RuntimeEnvSetupError"),
                *("OutOfMemoryError", "OutOfDiskError", "ObjectStoreFullError"),
            ),
        ),
        (
            "ray.train.v2._internal.exceptions",
            ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError"),
        ),
    ):
        if module in sys.modules:
            kinds += [getattr(sys.modules[module], n) for n in names if _has(module, n)]
    return tuple(kinds)


def _has(module: str, name: str) -> bool:
    return isinstance(getattr(sys.modules[module], name, None), type)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return str(error) or "the disk is full"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error}: install the package {error.name.partition('.')[0]}"
    return str(error) or type(error).__name__


def _cause(error: BaseException) -> BaseException:
    """The exception that a worker raised, out of what Ray wrapped around it."""
    visited_ids: set[int] = set()
    while id(error) not in visited_ids:
        visited_ids.add(id(error))
        error = next(_inner_errors(error), error)
    return error


def _inner_errors(error: BaseException) -> Iterator[BaseException]:
    # Ray's own fields, by name, so that a job that needs no Ray does not import it.
    if not type(error).__module__.startswith("ray."):
        return
    failures: Any = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):  # ray.train's WorkerGroupError, by rank
        yield from (failures[rank] for rank in sorted(failures))
    # RayTaskError; ray.train's ControllerError; what holds a worker's exception with its trace
    for name in ("cause", "controller_failure", "_base_exc"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            yield inner
