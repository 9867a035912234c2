"""Which kernels an engine computes with on a CPU: chosen, compiled for this processor, and cached.

An engine starts in any case. Where the kernels cannot be compiled or loaded (no compiler, one that
fails, no folder from which the system executes code), torch's operations do the same, 2 to 3 times
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

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "linear.c"))
HEADERS = (Path(__file__).with_name("registers.h"),)
HEAD_MULTIPLE = 16
TILE_QUERIES = 8
"""To a key/value head, that read its keys together: the rows of a prompt, or of draft tokens."""
COMPILE_SECONDS = 60
CPUINFO = Path("/proc/cpuinfo")
OPTIONS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_WIDE = "-mprefer-vector-width=512"  # clang would take 256 bits where there are 512
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", _WIDE)
LEVELS: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": (),
}
"""Instructions that can be asked for, best first, with the compiler's options. "generic" is what
all processors of the architecture have: SSE2 on x86-64, NEON on 64-bit ARM."""
_NEEDED = {
    "amx": {"amx_tile", "amx_bf16", "avx512f", "avx512dq", "avx512bw", "avx512vl"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma", "bmi2"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "generic": set(),
}


def processor() -> dict[str, str]:
    """What identifies this machine's processor for a compiler: its model and its features."""
    names = {"vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features"}
    names |= {"CPU implementer", "CPU part", "CPU variant", "isa", "uarch"}
    found = {"machine": platform.machine(), "system": platform.system()}
    try:
        first = CPUINFO.read_text().split("\n\n", 1)[0]
    except OSError:
        return {**found, "processor": platform.processor()}
    lines = (line.partition(":") for line in first.splitlines())
    return found | {k.strip(): v.strip() for k, _, v in lines if k.strip() in names}


def available() -> tuple[str, ...]:
    """The levels that this processor has, best first."""
    features = set(processor().get("flags", "").split())
    if "amx_tile" in features and not _tiles_granted():
        features.discard("amx_tile")
    return tuple(level for level, needed in _NEEDED.items() if needed <= features)


def _tiles_granted() -> bool:
    """Whether Linux grants this process the registers of AMX, which it has to ask for."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


@functools.cache
def native(head_dim: int, group: int, kernels: str = "auto") -> Native | None:
    """The kernels for heads of ``head_dim`` floats of which ``group`` share keys and values.

    ``kernels`` is "auto", all that this processor has, or one of ``LEVELS``. None where they cannot
    be had: a warning then says why. ValueError for a level that the processor has not.
    """
    if kernels != "auto" and kernels not in available():
        has = ", ".join(("auto", *available(), "torch"))
        raise ValueError(f"kernels={kernels!r} is not allowed: this machine has {has}")
    reasons: list[str] = []
    made = None
    if head_dim % HEAD_MULTIPLE:
        reasons.append(f"heads of {head_dim}, which is no multiple of {HEAD_MULTIPLE}")
    else:
        tile = max(1, TILE_QUERIES // group)
        sizes = (f"-DHEAD={head_dim}", f"-DGROUP={group}", f"-DTILE={tile}")
        library = _library(sizes, _choices(kernels), reasons)
        made = Native(head_dim, tile, library) if library is not None else None
    if made is None:
        logger.warning(
            "the engine computes with torch, 2 to 3 times slower than with its own kernels, "
            "since they are missing: %s",
            "; ".join(reasons),
        )
    else:
        logger.info("the engine's kernels: %s", made.level)
    return made


def _choices(kernels: str) -> list[tuple[str, ...]]:
    """The compiler's options to try, one after the other, until one compiles.

    With gcc, OpenMP is what torch has loaded already: one pool of threads. Without it one thread
    computes, and a compiler that does not know this processor does with what all of its kind have.
    """
    if kernels != "auto":
        return [(*LEVELS[kernels], "-fopenmp"), LEVELS[kernels]]
    arm = platform.machine() in ("aarch64", "arm64")
    wide = (_WIDE,) if platform.machine() == "x86_64" else ()
    target = ("-mcpu=native" if arm else "-march=native", *wide)
    return [(*target, "-fopenmp"), target, ("-fopenmp",), ()]


def _library(
    sizes: Sequence[str], choices: Sequence[tuple[str, ...]], reasons: list[str]
) -> ctypes.CDLL | None:
    """The compiled library, from the cache if it is there; None, with reasons added, if it cannot
    be compiled or loaded."""
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
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.info("compiled kernels are not cached: %s", error)
    try:
        with tempfile.TemporaryDirectory(dir=_writable(cache)) as folder:
            version = _run([*compiler, "--version"], folder)
            for choice in choices:
                options = (*OPTIONS, *choice, *sizes)
                key = _key((*compiler, *options), version)
                library = _cached(cache, key)
                if library is None:
                    built = Path(folder) / "native.so"
                    command = [*compiler, *options, *map(str, SOURCES), "-o", str(built), "-lm"]
                    try:
                        _run(command, folder)
                    except RuntimeError as error:
                        reasons.append(str(error))
                        continue
                    library = _load(built.read_bytes(), cache, key)
                if reasons:
                    with_ = " ".join(choice) or "no option for this processor"
                    logger.warning("kernels compiled with %s, since: %s", with_, "; ".join(reasons))
                return library
    except (OSError, TimeoutError, RuntimeError) as error:
        reasons.append(str(error))
    return None


def _writable(cache: Path | None) -> Path | None:
    """Where to compile: the system's temporary folder (None), or the cache if there is none."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        if cache is None:
            raise
        return cache
    return None


def _key(command: Sequence[str], version: str) -> str:
    """Names all that the content of a library follows from."""
    sources = {p.name: p.read_text() for p in (*SOURCES, *HEADERS)}
    whole = json.dumps([sources, command, version, processor()], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _cached(cache: Path | None, key: str) -> ctypes.CDLL | None:
    if cache is None:
        return None
    try:
        path = kernel_cache.find(cache, key)
        return ctypes.CDLL(str(path)) if path is not None else None
    except OSError as error:  # another process removed it, or the folder is mounted noexec
        logger.info("cached kernels were not loaded: %s", error)
        return None


def _load(library: bytes, cache: Path | None, key: str) -> ctypes.CDLL:
    """Loads a library from the cache or, where that is impossible, from a temporary folder.
    OSError if neither may hold code."""
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
    """What the command prints. RuntimeError if it fails; TimeoutError, with all that it has
    started ended, if it hangs."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": folder},
            start_new_session=True,  # a compiler's parts are processes too
        )
    except OSError as error:
        raise RuntimeError(f"the C compiler does not start: {error}") from None
    try:
        printed, complaint = process.communicate(timeout=COMPILE_SECONDS)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"{command[0]} took more than {COMPILE_SECONDS} s") from None
        raise
    if process.returncode:
        shown = complaint.strip()[:500] or f"status {process.returncode}"
        raise RuntimeError(f"{command[0]} failed: {shown}")
    return printed


if __name__ == "__main__":  # for cluster/check.sh
    print(*available())
