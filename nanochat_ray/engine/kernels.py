"""The C kernels of an engine on a CPU: compiled for this processor at start-up, and cached.

An engine starts in any case. If the kernels cannot be compiled or loaded (no compiler, one that
fails, no folder from which the system executes code), the engine computes with torch, 2 to 3 times
slower, and a warning says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nanochat_ray.engine import kernel_cache
from nanochat_ray.engine.native import Native

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("csrc")
SOURCES = tuple(sorted(FOLDER.glob("*.c")))
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
HEAD_MULTIPLE = 16
TILE_QUERIES = 8
"""Queries of a key/value head that read its keys together, of consecutive tokens of a prompt or of
draft tokens."""
COMPILE_SECONDS = 300
"""For a compiler that hangs. It takes 7 s of CPU time, of which a busy machine or a small pod may
give little: 34 s were seen beside 12 other processes on 2 cores."""
CPUINFO = Path("/proc/cpuinfo")
OPTIONS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_WIDE = "-mprefer-vector-width=512"  # else clang uses 256 bits
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", _WIDE)
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
    "avx512_bf16": _AVX512_BF16,
    "avx512": _AVX512,
    "avx_vnni": (*_AVX2, "-mavxvnni"),
    "avx2": _AVX2,
    "generic": (),
}
"""Instruction sets that a configuration can name, best first, with the compiler's options.
"generic" is the baseline of the architecture: SSE2 on x86-64, NEON on 64-bit ARM."""
_AVX2_FEATURES = {"avx2", "fma", "f16c", "bmi2"}
_AVX512_FEATURES = {*_AVX2_FEATURES, "avx512f", "avx512dq", "avx512bw", "avx512vl"}
_AVX512_BF16_FEATURES = {*_AVX512_FEATURES, "avx512_bf16", "avx512_vnni"}
_CPU_FEATURES = {
    "amx": {*_AVX512_BF16_FEATURES, "amx_tile", "amx_bf16"},
    "avx512_bf16": _AVX512_BF16_FEATURES,
    "avx512": _AVX512_FEATURES,
    "avx_vnni": {*_AVX2_FEATURES, "avx_vnni"},
    "avx2": _AVX2_FEATURES,
    "generic": set(),
}


def processor() -> dict[str, str]:
    """What identifies this machine's processor to a compiler: its model and its features."""
    names = {"vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features"}
    names |= {"CPU implementer", "CPU part", "CPU variant", "isa", "uarch"}
    identity = {"machine": platform.machine(), "system": platform.system()}
    try:
        first = CPUINFO.read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return {**identity, "processor": platform.processor()}
    lines = (line.partition(":") for line in first.splitlines())
    return identity | {k.strip(): v.strip() for k, _, v in lines if k.strip() in names}


def available() -> tuple[str, ...]:
    """The levels that this processor supports, best first."""
    features = set(processor().get("flags", "").split())
    if "amx_tile" in features and not _amx_permission():
        features.discard("amx_tile")
    return tuple(level for level, needs in _CPU_FEATURES.items() if needs <= features)


def _amx_permission() -> bool:
    """Whether Linux grants this process the registers of AMX, which it must request."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@functools.cache
def load_kernels(head_dim: int, group_size: int, kernels: str = "auto") -> Native | None:
    """The kernels for heads of ``head_dim`` floats, ``group_size`` of which share keys and values.

    ``kernels`` is "auto", everything that this processor supports, or one of ``LEVELS``. None, with
    a warning, if they are not available. ValueError for a level that the processor lacks.
    """
    if kernels != "auto" and kernels not in available():
        has = ", ".join(("auto", *available(), "torch"))
        raise ValueError(f"kernels={kernels!r} is not allowed: this machine has {has}")
    reasons: list[str] = []
    native = None
    if head_dim % HEAD_MULTIPLE:
        reasons.append(f"heads of {head_dim}, which is no multiple of {HEAD_MULTIPLE}")
    else:
        tile_tokens = max(1, TILE_QUERIES // group_size)
        constants = {"HEAD_DIM": head_dim, "GROUP_SIZE": group_size, "TILE_TOKENS": tile_tokens}
        sizes = [f"-D{name}={value}" for name, value in constants.items()]
        library = _library(sizes, _target_options(kernels), reasons)
        native = Native(head_dim, tile_tokens, library) if library is not None else None
    if native is None:
        logger.warning(
            "the engine computes with torch, 2 to 3 times slower than with its own kernels, "
            "since they are missing: %s",
            "; ".join(reasons),
        )
    else:
        logger.info("the engine's kernels: %s", native.level)
    return native


def _target_options(kernels: str) -> list[tuple[str, ...]]:
    """Compiler options to try in this order, until one compiles.

    With gcc, OpenMP is the one that torch has loaded: one pool of threads. Without OpenMP one
    thread computes. A compiler that does not know this processor compiles for the baseline.
    """
    if kernels != "auto":
        return [(*LEVELS[kernels], "-fopenmp"), LEVELS[kernels]]
    arm = platform.machine() in ("aarch64", "arm64")
    wide = (_WIDE,) if platform.machine() == "x86_64" else ()
    target = ("-mcpu=native" if arm else "-march=native", *wide)
    if "amx" not in available():  # also of a processor that has it, where Linux refuses its tiles
        target += ("-DWITHOUT_AMX",)
    return [(*target, "-fopenmp"), target, ("-fopenmp",), ()]


def _library(
    sizes: Sequence[str], targets: Sequence[tuple[str, ...]], reasons: list[str]
) -> ctypes.CDLL | None:
    """The compiled library, from the cache if possible; None, with the reasons appended, if it
    cannot be compiled or loaded."""
    try:
        compiler = shlex.split(os.environ.get("CC") or shutil.which("cc") or "")
    except ValueError as error:
        reasons.append(f"CC={os.environ['CC']!r}: {error}")
        return None
    if not compiler:
        reasons.append("no C compiler (cc)")
        return None
    cache: Path | None = None
    try:
        cache = kernel_cache.private_folder(kernel_cache.default_folder())
    except (OSError, ValueError) as error:  # ValueError: there is no home
        logger.info("compiled kernels are not cached: %s", error)
    try:
        with tempfile.TemporaryDirectory(dir=_writable(cache)) as folder:
            version = _run([*compiler, "--version"], folder)
            for target in targets:
                options = (*OPTIONS, *target, *sizes)
                key = _key((*compiler, *options), version)
                library = _find(cache, key)
                if library is None:
                    output = Path(folder) / "native.so"
                    command = [*compiler, *options, *map(str, SOURCES), "-o", str(output), "-lm"]
                    try:
                        _run(command, folder)
                    except RuntimeError as error:
                        reasons.append(str(error))
                        continue
                    library = _load(output.read_bytes(), cache, key)
                if reasons:
                    options_text = " ".join(target) or "no option for this processor"
                    logger.warning(
                        "kernels compiled with %s, since: %s", options_text, "; ".join(reasons)
                    )
                return library
    except (OSError, TimeoutError, RuntimeError) as error:
        reasons.append(str(error))
    return None


def _writable(cache: Path | None) -> Path | None:
    """Where to compile: in the system's temporary folder (None), or in the cache without one."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if cache is None:
            raise
        return cache
    return None


def _key(command: Sequence[str], version: str) -> str:
    """A digest of everything that determines the content of a library."""
    sources = {p.name: p.read_text(encoding="utf-8") for p in (*SOURCES, *HEADERS)}
    text = json.dumps([sources, command, version, processor()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _find(cache: Path | None, key: str) -> ctypes.CDLL | None:
    if cache is None:
        return None
    try:
        path = kernel_cache.find(cache, key)
        return ctypes.CDLL(str(path)) if path is not None else None
    except OSError as error:  # another process removed it, or the folder is mounted noexec
        logger.info("cached kernels were not loaded: %s", error)
        return None


def _load(library: bytes, cache: Path | None, key: str) -> ctypes.CDLL:
    """Loads a library through the cache or, if that is impossible, from a temporary folder. OSError
    if the system executes code from neither."""
    if cache is not None:
        try:
            return ctypes.CDLL(str(kernel_cache.publish(cache, key, library)))
        except OSError as error:
            logger.info("compiled kernels are not cached: %s", error)
    with tempfile.TemporaryDirectory() as folder:  # mode 0700
        path = Path(folder) / "native.so"
        path.write_bytes(library)
        return ctypes.CDLL(str(path))


def _run(command: list[str], folder: str) -> str:
    """The command's output. RuntimeError if it fails; TimeoutError if it hangs, after it and the
    processes that it started are killed."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": folder},
            start_new_session=True,  # a compiler starts other processes
        )
    except OSError as error:
        raise RuntimeError(f"the C compiler does not start: {error}") from None
    try:
        output, errors = process.communicate(timeout=COMPILE_SECONDS)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"{command[0]} took more than {COMPILE_SECONDS} s") from None
        raise
    if process.returncode:
        reason = errors.strip()[:500] or f"status {process.returncode}"
        raise RuntimeError(f"{command[0]} failed: {reason}")
    return output


if __name__ == "__main__":  # for cluster/check.sh
    print(*available())
