"""Configuration of a deployment on Ray Serve. Importing it needs no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.serve import keys
from nanochat_ray.serve.auth import check_origins
from nanochat_ray.serve.hosts import check_hosts
from nanochat_ray.storage import absolute, default_root


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What is served, by how many replicas: plain JSON values, as in a Serve config file."""

    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds the runs."""
    run: str = "chat"
    """Name of the run."""
    checkpoint: str = ""
    """Name of a checkpoint, or best by validation; by default the latest. All replicas serve this
    one, and a restarted replica loads it again, so keep it. Not with follow."""
    name: str = ""
    """The model's name for clients; by default that of the run."""
    num_replicas: int = 1
    """Engine replicas, each with the whole model."""
    max_replicas: int = 0
    """Autoscale up to this, by queue length and KV-cache usage; 0 is off."""
    upscale_delay_s: float = 10.0
    """Seconds that more replicas are needed before they start."""
    downscale_delay_s: float = 300.0
    """Seconds that fewer replicas are needed before one stops."""
    num_ingress_replicas: int = 1
    """HTTP replicas."""
    gpus: float = 0.0
    """GPUs of each engine replica."""
    cpus: float = 1.0
    """Logical CPUs of each engine replica."""
    threads: int = 0
    """Torch threads of an engine replica on a CPU; 0 is its share of all cores but one, if all
    replicas are on one machine."""
    ingress_cpus: float = 0.1
    """Logical CPUs of each HTTP replica."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    follow: Literal["", "latest", "best"] = ""
    """Serve each new checkpoint that is the latest, or best by validation."""
    follow_margin: float = 0.05
    """With follow, a checkpoint whose validation metric is worse than the served one's by more than
    this is refused."""
    swap: Literal["drain", "immediate"] = "drain"
    """With drain, running requests finish on their weights before new ones are loaded; with
    immediate those that have sent text end with an error, and others begin again."""
    swap_drain_s: float = 30.0
    """Seconds that running requests may take to finish before new weights replace theirs."""
    deadline_s: float = 60.0
    """Seconds that a request may wait for another engine replica after its own has died."""
    liveness_timeout_s: float = 10.0
    """Seconds after which an engine replica that sends nothing, or hangs in a step, counts as lost:
    its requests continue on another one."""
    request_timeout_s: float = 0.0
    """Seconds that a request may take, waiting and running; 0 is no limit."""
    key_hashes: tuple[str, ...] = ()
    """Hashes of the API keys (``python -m nanochat_ray.serve.keys``); without these and key_file
    clients need no key."""
    key_file: str = ""
    """File with API keys on every node that runs HTTP replicas. Such as a mounted Kubernetes
    secret; it is read when a replica starts, which fails without it."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose pages may send requests (CORS): https://a.example or *."""
    suggestions: tuple[str, ...] = ()
    """Questions that the chat page offers in an empty conversation."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request's Host may have, beside addresses; by default localhost where the
    endpoint is bound to loopback, any elsewhere."""
    access_log: bool = True
    """Log a line for each request."""

    def __post_init__(self) -> None:
        for name, least in (("num_replicas", 1), ("num_ingress_replicas", 1), ("threads", 0)):
            check_int(name, getattr(self, name), least)
        most = self.max_replicas
        if not isinstance(most, int) or 0 != most < self.num_replicas:
            requirement = f"0, or a whole number from num_replicas={self.num_replicas}"
            raise ValueError(f"max_replicas={most!r} is not allowed: {requirement}")
        for name in ("upscale_delay_s", "downscale_delay_s", "deadline_s", "request_timeout_s"):
            check_float(name, getattr(self, name))
        check_float("liveness_timeout_s", self.liveness_timeout_s, 1.0)
        for name in ("gpus", "cpus", "ingress_cpus", "follow_margin", "swap_drain_s"):
            check_float(name, getattr(self, name))
        if self.gpus:
            precision = self.engine.precision
            require(precision != "int8", "precision", precision, "fp32 or bf16 with gpus")
        object.__setattr__(self, "key_hashes", tuple(self.key_hashes))
        keys.check_hashes("key_hashes", self.key_hashes)
        object.__setattr__(self, "allowed_origins", tuple(self.allowed_origins))
        check_origins("allowed_origins", self.allowed_origins)
        object.__setattr__(self, "allowed_hosts", tuple(self.allowed_hosts))
        check_hosts("allowed_hosts", self.allowed_hosts)
        require(self.follow in ("", "latest", "best"), "follow", self.follow, "latest or best")
        rule = "not with follow; nanochat-ray rollback serves another checkpoint of the run"
        require(not (self.follow and self.checkpoint), "checkpoint", self.checkpoint, rule)
        require(self.swap in ("drain", "immediate"), "swap", self.swap, "drain or immediate")
        object.__setattr__(self, "suggestions", tuple(self.suggestions))
        ok = all(isinstance(text, str) and text.strip() for text in self.suggestions)
        require(ok, "suggestions", self.suggestions, "texts that are not empty")
        check_name("run", self.run)
        if self.checkpoint:
            check_name("checkpoint", self.checkpoint)
        # The replicas' working directory is another one.
        object.__setattr__(self, "storage", absolute(self.storage))

    @property
    def drain_s(self) -> float:
        """How long new weights wait for running requests."""
        return self.swap_drain_s if self.swap == "drain" else 0.0
