"""Which checkpoint of a run an endpoint serves next: watching, verifying, refusing, rolling back.

``CheckpointWatcher.poll`` looks at a run and returns a verified checkpoint that is to be served, or
None. What cannot be served is refused with a reason, and examined again when its manifest changes
or after a while, since storage may have failed. An operator pins a checkpoint with ``pin``
(``nanochat-ray rollback``), through a file of the run, so that this works wherever the endpoint
runs:

    runs/<run>/serving/<endpoint>.json      what the endpoint serves, by the watcher
    runs/<run>/serving/<endpoint>.pin.json  what it shall serve, by an operator
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checkpoint.lease import Lease, file_name
from nanochat_ray.checkpoint.reader import CheckpointReader, parse_object
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.storage import Store

Target = Literal["latest", "best"]
INCOMPLETE_S = 30.0
"""How long a checkpoint may lack its manifest, which is written last, before it is refused."""
FIRST_RETRY_S, LAST_RETRY_S = 10.0, 600.0
"""A refused checkpoint is examined again after this long, each time twice as long."""
FOLDER = "serving"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedCheckpoint:
    """What must agree between a checkpoint that is served and the next one."""

    name: str
    version: str
    """``checkpoint.weight_version``."""
    model: ModelConfig
    tokenizer: str
    """Its fingerprint."""
    val_metric: float | None
    """Of the run's validation, lower being better; None without one."""

    @classmethod
    def of(cls, run: Store, name: str) -> ServedCheckpoint:
        """Raises ValueError, naming the file, for one that is incomplete or damaged."""
        config = checkpoint.load_config(run, name)
        return cls(
            name=name,
            version=checkpoint.weight_version(run, name),
            model=config.model,
            tokenizer=config.tokenizer,
            val_metric=checkpoint.val_metric(run, name),
        )


@dataclass(frozen=True)
class NewCheckpoint:
    """A checkpoint that may be served, and its weights as a state dict in host memory."""

    about: ServedCheckpoint
    weights: dict[str, Tensor] | None
    """Verified; None if the engines read them (``CheckpointWatcher``)."""


@dataclass
class Refusal:
    """Why a checkpoint is not served."""

    reason: str
    manifest: bytes
    retry_at: float
    delay: float


class CheckpointWatcher:
    """Decides for one endpoint. ``name`` is the endpoint's (the model's name for clients).

    With ``reads_weights`` it reads and verifies the weights. Without, whoever loads them does, and
    calls ``refuse`` if they are damaged.
    """

    def __init__(
        self,
        run: Store,
        name: str,
        target: Target,
        current: ServedCheckpoint,
        *,
        margin: float,
        reads_weights: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.run, self.target, self.margin = run, target, margin
        self.reads_weights = reads_weights
        self.current = current
        self.previous = str(_record(run, name).get("previous") or "")
        self.pin_name: str | None = None
        self.refusals: dict[str, Refusal] = {}
        self.num_refusals = self.num_swaps = 0
        self._name, self._clock = name, clock
        self._first_seen: dict[str, float] = {}
        """When each incomplete checkpoint was noticed."""
        # Not the name alone: other endpoints of the run may have the same.
        self._lease = Lease(run, f"follow-{name}-{secrets.token_hex(4)}")
        self._publish()

    def status(self) -> dict[str, Any]:
        """JSON values for people and metrics."""
        return {
            "target": self.target,
            "checkpoint": self.current.name,
            "weight_version": self.current.version,
            "previous": self.previous,
            "pinned": self.pin_name,
            # Another thread may poll meanwhile.
            "refused": {name: refusal.reason for name, refusal in list(self.refusals.items())},
            "num_refusals": self.num_refusals,
            "num_swaps": self.num_swaps,
        }

    def poll(self) -> NewCheckpoint | None:
        """The checkpoint to serve next; None if that does not change. Raises OSError if the run
        cannot be read."""
        self._lease.hold(filter(None, (self.current.name, self.previous)))
        self.pin_name = read_pin(self.run, self._name)
        names = [self.pin_name] if self.pin_name else list(self._candidates())
        self._forget_all_but(names)
        for name in names:
            manifest = self._manifest(name)
            if manifest is None or self._is_refused(name, manifest):
                continue
            try:
                new = self._examine(name)
            except ValueError as error:
                self.refuse(name, str(error), manifest)
                continue
            if new is not None:
                return new
            self.refusals.pop(name, None)
        return None

    def accept(self, new: NewCheckpoint) -> None:
        """The endpoint serves it now."""
        self.previous, self.current = self.current.name, new.about
        self.refusals.pop(self.current.name, None)
        self.num_swaps += 1
        self._lease.hold((self.current.name, self.previous))
        self._publish()
        _LOG.warning("%s is served, after %s", new.about.version, self.previous)

    def refuse(self, name: str, reason: str, manifest: bytes | None = None) -> None:
        before = self.refusals.get(name)
        delay = FIRST_RETRY_S
        if before is None or before.reason != reason:
            self.num_refusals += 1
            _LOG.warning("checkpoint %s is refused: %s", name, reason)
        else:
            delay = min(2 * before.delay, LAST_RETRY_S)
        data = (self._manifest(name) or b"") if manifest is None else manifest
        self.refusals[name] = Refusal(reason, data, self._clock() + delay, delay)

    def _forget_all_but(self, names: Collection[str]) -> None:
        """Those that were pruned, or are behind the served one, will not be asked for again."""
        self.refusals = {k: v for k, v in self.refusals.items() if k in names}
        self._first_seen = {k: v for k, v in self._first_seen.items() if k in names}

    def close(self) -> None:
        """Ends the lease."""
        self._lease.release()

    def _candidates(self) -> Iterator[str]:
        """Names of checkpoints that may be better than the served one, the most wanted first."""
        if self.target == "latest":
            current_step = checkpoint.step_of(self.current.name)
            names = checkpoint.names(self.run)
            yield from (n for n in names if checkpoint.step_of(n) >= current_step)
            return
        metrics = checkpoint.val_metrics(self.run)
        limit = math.inf if self.current.val_metric is None else self.current.val_metric
        for name in sorted(metrics, key=metrics.__getitem__):
            if metrics[name] < limit or name == self.current.name:
                yield name

    def _manifest(self, name: str) -> bytes | None:
        """The bytes of its manifest; None if it has none, which is refused after a while."""
        try:
            data = self.run.read_bytes(f"{name}/manifest.json")
        except (FileNotFoundError, NotADirectoryError):
            first = self._first_seen.setdefault(name, self._clock())
            if self._clock() - first > INCOMPLETE_S and name not in self.refusals:
                self.refuse(name, "it is incomplete: manifest.json is missing", b"")
            return None
        self._first_seen.pop(name, None)
        return data

    def _is_refused(self, name: str, manifest: bytes) -> bool:
        refusal = self.refusals.get(name)
        if refusal is None or refusal.manifest != manifest:
            return False
        return self._clock() < refusal.retry_at

    def _examine(self, name: str) -> NewCheckpoint | None:
        """A verified checkpoint; None if it is served already. ValueError if it may not be."""
        if checkpoint.weight_version(self.run, name) == self.current.version:
            return None
        about = ServedCheckpoint.of(self.run, name)
        self._check_fits(about)
        if not self.pin_name:
            self._check_metric(about)
        reader = CheckpointReader(self.run.child(name), checkpoint.step_of(name))
        reader.tokenizer(reader.config())
        weights = reader.tensors("weights.msgpack") if self.reads_weights else None
        return NewCheckpoint(about, weights)

    def _check_fits(self, about: ServedCheckpoint) -> None:
        current = self.current
        if about.tokenizer != current.tokenizer:
            raise ValueError(
                f"it has another tokenizer ({about.tokenizer[:16]}…) than {current.name} "
                f"({current.tokenizer[:16]}…)"
            )
        for field in dataclasses.fields(about.model):
            new, old = (getattr(each.model, field.name) for each in (about, current))
            if new != old:
                raise ValueError(
                    f"it is of another architecture: {field.name}={new!r}, and {current.name} has "
                    f"{old!r}"
                )

    def _check_metric(self, about: ServedCheckpoint) -> None:
        new, old = about.val_metric, self.current.val_metric
        if new is not None and old is not None and new > old + self.margin:
            raise ValueError(
                f"its validation metric {new:.4f} is worse than {old:.4f} of "
                f"{self.current.name} by more than follow_margin={self.margin:g}"
            )

    def _publish(self) -> None:
        value = {"checkpoint": self.current.name, "version": self.current.version}
        try:
            text = json.dumps({**value, "previous": self.previous})
            self.run.write_text(f"{FOLDER}/{file_name(self._name)}.json", text)
        except OSError as error:  # read-only storage: rollback then needs --to
            _LOG.warning("the served checkpoint cannot be recorded: %s", error)


def _read(run: Store, file: str) -> dict[str, Any]:
    """A file of the run's serving folder; empty if there is none or it is damaged."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return parse_object(file, run.read_bytes(f"{FOLDER}/{file}"))
    return {}


def _record(run: Store, name: str) -> dict[str, Any]:
    return _read(run, f"{file_name(name)}.json")


def served_checkpoint(run: Store, name: str) -> str:
    """The checkpoint that endpoint ``name`` served last; "" if it follows no run."""
    return str(_record(run, name).get("checkpoint") or "")


def previous_checkpoint(run: Store, name: str) -> str:
    """The one that it served before; "" if there is none."""
    return str(_record(run, name).get("previous") or "")


def read_pin(run: Store, name: str) -> str | None:
    """The checkpoint to which endpoint ``name`` is pinned."""
    value = _read(run, f"{file_name(name)}.pin.json").get("checkpoint")
    return value if isinstance(value, str) and value else None


def pin(run: Store, name: str, checkpoint_name: str) -> None:
    """Pins endpoint ``name`` to a checkpoint until ``unpin``. ValueError if it is not there."""
    checkpoint_name = checkpoint.resolve(run, checkpoint_name)
    run.write_text(
        f"{FOLDER}/{file_name(name)}.pin.json", json.dumps({"checkpoint": checkpoint_name})
    )


def unpin(run: Store, name: str) -> None:
    """Lets endpoint ``name`` follow its run again."""
    run.delete(f"{FOLDER}/{file_name(name)}.pin.json")


def first_checkpoint(run: Store, name: str, target: Target) -> str:
    """The checkpoint with which endpoint ``name`` starts: pinned, served last, or by ``target``.

    ValueError if the run has none."""
    for choice in (read_pin(run, name), served_checkpoint(run, name)):
        if choice and run.exists(f"{choice}/manifest.json"):
            return choice
    with contextlib.suppress(ValueError):
        return checkpoint.resolve(run, "best" if target == "best" else "")
    return checkpoint.resolve(run)
