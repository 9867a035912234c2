"""How kernels come to be: chosen by level, compiled, cached, and done without where they cannot."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanochat_ray.engine import kernel_cache, kernels
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.kernels import available, load_kernels
from tests.engine.engine_kit import answer, ask, make_engine, make_model, needs_compiler
from tests.processes import have_ended
from tests.waiting import wait_for

MakeCompiler = Callable[[str], Path]
ANEW = load_kernels.__wrapped__
"""Not what this process has compiled or loaded before."""
CC = os.environ.get("CC") or "cc"
MEMO = f"""#!/bin/sh
case "$*" in *--version*) exec {CC} "$@";; esac
key=$(printf %s "${{*%% -o *}}" | cksum | tr " " -)
output=${{*##* -o }}
output=${{output% -lm}}
new="$0-$key-$$"
[ -f "$0-$key" ] || {{ {CC} "$@" && cp "$output" "$new" && mv "$new" "$0-$key"; }} || exit
cp "$0-$key" "$output"
"""
"""A compiler that compiles once with the same options: what tests of the cache compile is equal."""
PASS_ON = f'exec {CC} "$@"'
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def memo_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memo") / "cc"
    path.write_text(MEMO)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memo_compiler: Path) -> Path:
    """A cache of the test's own, and a compiler in a hurry; the folder that kernels are kept in."""
    monkeypatch.setattr(kernels, "OPTIONS", ("-O0", "-shared", "-fPIC"))
    monkeypatch.setenv("CC", str(memo_compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanochat_ray" / "kernels"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCompiler:
    """Makes a shell script the compiler."""

    def make(script: str) -> Path:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))
        return path

    return make


@pytest.fixture
def compilations(compiler: MakeCompiler, memo_compiler: Path, tmp_path: Path) -> Callable[[], int]:
    """A compiler that says how often it has compiled."""
    log = tmp_path / "compiled"
    log.touch()
    compiler(f'case "$*" in *--version*) ;; *) echo x >> {log};; esac\nexec {memo_compiler} "$@"')
    return lambda: len(log.read_text().splitlines())


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


# --- levels ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("level", available())
def test_each_level_is_used(level: str) -> None:
    loaded_kernels = ANEW(64, 1, level)
    if loaded_kernels is None:
        pytest.skip(f"this compiler does not know {level}")
    assert loaded_kernels.level == level
    assert loaded_kernels.amx == (level == "amx")


@pytest.mark.slow
def test_auto_is_the_best_level() -> None:
    loaded_kernels = ANEW(64, 1)
    assert loaded_kernels is not None
    best = available()[0]
    assert loaded_kernels.level == best or best == "amx"  # an old compiler does not know AMX


def test_unsupported_level_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "vendor_id : AuthenticAMD\nflags\t: sse2 avx2 fma f16c bmi2\n\nflags : amx\n"
    )
    monkeypatch.setattr(kernels, "CPUINFO", cpuinfo)
    assert available() == ("avx2", "generic")
    for level in ("avx512", "amx"):
        with pytest.raises(
            ValueError, match=rf"kernels='{level}' is not .* auto, avx2, generic, t"
        ):
            ANEW(64, 1, level)
    monkeypatch.setattr(kernels, "CPUINFO", tmp_path / "none")
    assert available() == ("generic",)


def test_amx_needs_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = " ".join(set.union(*kernels._CPU_FEATURES.values()))
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags : {flags}\n")
    monkeypatch.setattr(kernels, "CPUINFO", cpuinfo)
    for permission, best in ((True, "amx"), (False, "avx512_bf16")):
        monkeypatch.setattr(kernels, "_amx_permission", lambda permission=permission: permission)
        assert available()[0] == best
        # -march=native would compile them in a processor that has them.
        assert ("-DWITHOUT_AMX" in kernels._target_options("auto")[0]) != permission


def test_matmuls_without_amx_use_no_tiles() -> None:
    command = [*shlex.split(CC), "-E", *kernels.LEVELS["amx"], "-DHEAD_DIM=64", "-DGROUP_SIZE=1"]
    command += ["-DTILE_TOKENS=8", str(kernels.FOLDER / "gemm.c")]
    for option, uses_tiles in (("-DWITH_AMX", True), ("-DWITHOUT_AMX", False)):
        source = subprocess.run([*command, option], capture_output=True, text=True, check=False)
        if source.returncode:
            pytest.skip("this compiler does not know AMX")
        assert ("multiply_amx" in source.stdout) == uses_tiles


def test_environment_variable_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_KERNELS", raising=False)
    assert EngineConfig().kernels == "auto"
    monkeypatch.setenv("NANOCHAT_KERNELS", "generic")
    assert EngineConfig().kernels == "generic"
    assert EngineConfig(kernels="torch").kernels == "torch"
    monkeypatch.setenv("NANOCHAT_KERNELS", "fast")
    with pytest.raises(ValueError, match="kernels='fast' is not allowed: auto or amx"):
        EngineConfig()


def test_stats_name_the_kernels() -> None:
    engine = make_engine(make_model.__wrapped__("classic"), kernels=available()[-1])
    assert engine.runner.native is not None
    assert engine.stats().kernels == engine.runner.native.level != "torch"
    plain = make_engine(make_model.__wrapped__("classic"), kernels="torch")
    assert plain.stats().kernels == "torch"
    assert answer(engine, ask("r", [1, 2, 3])) == answer(plain, ask("r", [1, 2, 3]))


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo out of order >&2; exit 3", "out of order"),
        (f'case "$*" in *--version*) {PASS_ON};; esac\nexit 4', "failed: status 4"),
        (f'case "$*" in *--version*) {PASS_ON};; esac', "native.so"),  # writes nothing
    ],
)
def test_failing_compiler_warns_once(
    script: str, reason: str, compiler: MakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler(script)
    assert ANEW(64, 1) is None
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "2 to 3 times slower" in warning
    assert reason in warning


@pytest.mark.parametrize("cc", ["/none/cc", 'cc "'])
def test_engine_starts_without_compiler(
    cc: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", cc)
    load_kernels.cache_clear()
    try:
        engines = [make_engine(make_model.__wrapped__("classic"), kernels="auto") for _ in range(2)]
    finally:
        load_kernels.cache_clear()
    assert engines[0].stats().kernels == "torch"
    assert len(answer(engines[0], ask("r", [1, 2, 3], max_tokens=4))) == 4
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1  # once a process
    assert "2 to 3 times slower" in warnings[0].getMessage()


def test_no_compiler_at_all_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert ANEW(64, 1) is None
    assert "no C compiler" in caplog.text


def test_unsupported_head_size_uses_torch(caplog: pytest.LogCaptureFixture) -> None:
    assert ANEW(40, 1) is None
    assert "heads of 40" in caplog.text


@pytest.mark.slow
def test_old_compiler_uses_the_baseline(
    compiler: MakeCompiler, caplog: pytest.LogCaptureFixture
) -> None:
    compiler(f'case "$*" in *=native*) echo who? >&2; exit 1;; esac\n{PASS_ON}')
    for _ in range(2):  # from the cache it is said as well
        caplog.clear()
        loaded_kernels = ANEW(64, 1)
        assert loaded_kernels is not None
        assert loaded_kernels.level == "generic"
        assert "who?" in caplog.text


def test_hanging_compiler_is_killed(
    compiler: MakeCompiler,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pid_file = tmp_path / "pid"
    compiler(f"sleep 600 & echo $! > {pid_file}; wait")
    children: list[psutil.Process] = []
    communicate = subprocess.Popen.communicate

    def communicate_once_it_hangs(process: Any, *args: Any, **options: Any) -> Any:
        if not children:
            wait_for(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
            children.append(psutil.Process(int(pid_file.read_text())))
        return communicate(process, *args, **options)

    monkeypatch.setattr(kernels.subprocess.Popen, "communicate", communicate_once_it_hangs)
    monkeypatch.setattr(kernels, "COMPILE_SECONDS", 0.05)
    assert ANEW(64, 1) is None
    assert "more than 0.05 s" in caplog.text
    wait_for(lambda: children and have_ended(children), what="the end of the compiler's child")


# --- the cache -------------------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_are_compiled_once(compilations: Callable[[], int], home: Path) -> None:
    one, again = ANEW(64, 1), ANEW(64, 1)
    assert one is not None
    assert again is not None
    assert compilations() == 1
    (library,) = libraries(home)
    assert home.stat().st_mode & 0o777 == 0o700
    assert library.stat().st_mode & 0o077 == 0
    assert ANEW(64, 2) is not None  # other sizes are another library
    assert compilations() == 2


@pytest.mark.slow
def test_cache_key_covers_cpu_and_source(
    compilations: Callable[[], int],
    compiler: MakeCompiler,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ANEW(64, 1) is not None
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "processor", lambda: {"flags": "of another machine"})
        assert ANEW(64, 1) is not None
    compiler(f'case "$*" in --version) echo 99.1; exit;; esac\n{PASS_ON}')
    assert ANEW(64, 1) is not None
    header = tmp_path / "simd.h"
    header.write_text(kernels.HEADERS[0].read_text() + "\n")
    monkeypatch.setattr(kernels, "HEADERS", (header,))
    assert ANEW(64, 1) is not None
    assert len({p.name.partition("-")[0] for p in libraries(home)}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "link", "fifo", "folder"])
def test_damaged_library_is_recompiled(
    damage: str, compilations: Callable[[], int], home: Path, tmp_path: Path
) -> None:
    assert ANEW(64, 1) is not None
    (library,) = libraries(home)
    content = library.read_bytes()
    library.unlink()  # not written over: this process has it mapped
    if damage == "cut":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        library.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
    elif damage == "empty":
        library.touch()
    elif damage == "link":
        elsewhere = tmp_path / "elsewhere.so"
        elsewhere.write_bytes(content)
        library.symlink_to(elsewhere)
    elif damage == "fifo":
        os.mkfifo(library)
    else:
        library.mkdir()
    assert ANEW(64, 1) is not None
    assert compilations() == 2
    assert ANEW(64, 1) is not None
    assert compilations() == (3 if damage == "folder" else 2)  # a folder in its place stays there


@pytest.mark.slow
def test_what_another_user_planted_is_not_loaded(
    compilations: Callable[[], int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ANEW(64, 1) is not None
    monkeypatch.setattr(kernel_cache.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        kernel_cache.private_folder(home)
    (library,) = libraries(home)
    assert not kernel_cache._is_intact(library)
    assert ANEW(64, 1) is not None  # compiled, in a temporary folder
    assert compilations() == 2


@pytest.mark.slow
def test_writable_library_is_not_loaded(compilations: Callable[[], int], home: Path) -> None:
    assert ANEW(64, 1) is not None
    (library,) = libraries(home)
    library.chmod(0o666)
    assert ANEW(64, 1) is not None
    assert compilations() == 2


@pytest.mark.slow
def test_replaceable_folder_is_not_used(compilations: Callable[[], int], home: Path) -> None:
    cache = home.parents[1]
    cache.mkdir()
    cache.chmod(0o777)
    for _ in range(2):
        assert ANEW(64, 1) is not None
    assert compilations() == 2
    assert not libraries(home)
    cache.chmod(0o1777)  # as /tmp has it: only owners rename
    for _ in range(2):
        assert ANEW(64, 1) is not None
    assert compilations() == 3


def test_cache_folder_becomes_private(home: Path) -> None:
    home.mkdir(parents=True)
    home.chmod(0o755)
    assert ANEW(64, 1) is not None
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_unwritable_home_is_tolerated(
    compilations: Callable[[], int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.parents[1].write_text("a file where the folder should be")
    assert ANEW(64, 1) is not None
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernel_cache.Path, "home", no_home)
    assert ANEW(64, 1) is not None
    assert compilations() == 2


def test_sources_are_read_in_any_locale() -> None:
    """Their comments are UTF-8, which is not the default encoding of files everywhere."""
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    program = (
        "import locale; assert locale.getpreferredencoding() == 'ANSI_X3.4-1968'; "
        "from nanochat_ray.engine import kernels; kernels._key([], '')"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=os.environ | ascii_locale, check=True)


@pytest.mark.parametrize("where", ["temporary", "cache", "both"])
def test_folders_mounted_noexec(
    where: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(kernels.tempfile, "tempdir", str(temporary))
    noexec = {"temporary": [temporary], "cache": [home], "both": [temporary, home]}[where]

    class Loader(ctypes.CDLL):
        def __init__(self, name: str | None):
            if name and any(folder in Path(name).parents for folder in noexec):
                raise OSError(f"{name}: failed to map segment from shared object")
            super().__init__(name)

    monkeypatch.setattr(kernels.ctypes, "CDLL", Loader)
    for _ in range(2):
        caplog.clear()
        loaded_kernels = ANEW(64, 1, "generic")
        assert (loaded_kernels is None) == (where == "both")
    assert ("failed to map segment" in caplog.text) == (where == "both")
    assert not list(temporary.iterdir())


def test_no_temporary_folder_at_all(
    compilations: Callable[[], int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(kernels.tempfile, "gettempdir", none)
    assert ANEW(64, 1) is not None
    assert len(libraries(home)) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert ANEW(64, 1) is None


def test_old_libraries_are_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "MAX_FILES", 3)
    folder = kernel_cache.private_folder(home)
    for i in range(5):
        path = kernel_cache.publish(folder, f"key{i}", bytes([i]))
        os.utime(path, (1000 + i, 1000 + i))
    assert len(libraries(home)) == 3
    assert kernel_cache.find(folder, "key4") == path
    assert kernel_cache.find(folder, "key0") is None
    assert kernel_cache.find(folder, "key") is None
