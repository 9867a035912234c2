"""Whatever is wrong with a flag or with what it names: one line on stderr and status 2."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nanochat_ray import cli
from nanochat_ray.checks import check_float, check_int, check_name, short_repr
from nanochat_ray.cli import entry, flags
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from tests.tiny import TOKENIZER, write_dataset

REPO = Path(__file__).parents[2]


def exit_of(main: Callable[..., Any], args: type, *flags: str) -> tuple[Any, str]:
    """Status and stderr of a job that is called with these flags, in this process."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as exit_:
        entry.run(main, args, None, flags)
    return exit_.value.code, stderr.getvalue()


def refusal(job: str, *flags: str) -> str:
    """The one line with which a job refuses its flags."""
    package = "bench" if job.startswith("bench ") else "cli"
    name = job.removeprefix("bench ").replace("-", "_")
    module = importlib.import_module(f"nanochat_ray.{package}.{name}")
    # A wrong flag that quickstart does not refuse must not start one.
    main = module.main if name != "quickstart" else lambda args: 0
    status, stderr = exit_of(main, module.Args, *flags)
    assert status == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line


BAD_FLAGS = {
    "train": [
        ("--workers 0", "workers=0"),
        ("--workers x", "--workers='x' is not allowed: a whole number"),
        ("--workers 1.5", "--workers='1.5'"),
        ("--workers", "--workers needs a value"),
        ("--worker 3", "unknown argument '--worker 3': --workers, perhaps? see --help"),
        ("--train.steps 3", "unknown argument '--train.steps 3': --steps, perhaps? see"),
        ("--modle.softcap=3", "unknown argument '--modle.softcap=3': --model.softcap, perhaps?"),
        ("base", "unknown argument 'base': see --help"),
        ("--min-workers -1", "min_workers=-1"),
        ("--min-workers 3 --workers 2", "min_workers=3"),
        ("--threads 0", "threads=0"),
        ("--tokens -5", "tokens=-5"),
        ("--tokens 1e6", "--tokens='1e6'"),
        ("--batch-tokens -1", "batch_tokens=-1 is not allowed: a whole number from 0 to 2**62"),
        ("--micro-batch-size -1", "micro_batch_size=-1"),
        ("--global-batch-size 0", "global_batch_size=0"),
        ("--model.softcap x", "--model.softcap='x' is not allowed: a number"),
        ("--model.colour red", "unknown argument '--model.colour red': see --help"),
        ("--options window_pattern=SSSL", "it is now --model.window-pattern SSSL"),
        ("--options fp8=true", "it is now --fp8"),
        ("--options normuon=false", "it is now --optim.no-normuon"),
        ("--options warmup=0.1", "it is now --optim.warmup-ratio 0.1"),
        ("--options", "unknown argument '--options'"),
        ("--momentum 0.9", "unknown argument '--momentum': it is now --optim.momentum"),
        ("--ratio 3", "unknown argument '--ratio': it is now --tokens-per-param"),
        ("--cpu-minutes inf", "cpu_minutes=inf"),
        ("--cpu-minutes nan", "cpu_minutes=nan"),
        ("--cpu-minutes -1", "cpu_minutes=-1.0"),
        ("--print-every 0", "print_every=0"),
        ("--sample-tokens -1", "sample_tokens=-1"),
        ("--save-every -1", "save_every=-1"),
        ("--keep-latest-k 0", "keep_latest_k=0"),
        ("--seed -1", "seed=-1"),
        ("--lr-scale nan", "lr_scale=nan"),
        ("--lr-scale 0", "lr_scale=0.0"),
        ("--tokens-per-param -1", "tokens_per_param=-1.0"),
        ("--spike-clip nan", "spike_clip=nan"),
        ("--depth 0", "depth=0"),
        ("--depth 99999999999999999999", "depth=99999999999999999999"),
        ("--preset newest", "preset='newest' is not allowed: modern or classic"),
        ("--precision fp64", "--precision='fp64' is not allowed: one of auto, fp32, bf16"),
        ("--stage rl", "--stage='rl'"),
        ("--resume maybe", "--resume='maybe'"),
        ("--hardware h999", "hardware='h999'"),
        ("--run ../../evil", "run='../../evil'"),
        ("--run a/b", "run='a/b'"),
        ("--run .", "run='.'"),
        ("--run 'a b'", "run='a b'"),
        ("--dataset /etc", "dataset='/etc'"),
        ("--dataset nothing", "dataset='nothing' is not in"),
        ("--storage ''", "storage=''"),
        ("--storage ftp://x", "storage='ftp://x'"),
        ("--stage sft --parent ..", "parent='..'"),
        ("--stage sft --parent nothing", "parent='nothing' has no checkpoint"),
        ("--stage sft --parent ''", "parent=''"),
        ("--parent nothing --run more", "parent='nothing' has no checkpoint"),
        ("--parent base", "parent='base' is not allowed: another run than --run"),
        ("--parent base --depth 3", "--depth=3 is not allowed: not with --parent"),
        ("--parent base --preset classic", "--preset='classic' is not allowed: not with --parent"),
        ("--stage sft --depth 4", "--depth=4 is not allowed: only with --stage base"),
        ("--stage sft --preset modern", "--preset='modern'"),
        ("--stage sft --tokens 0", "--tokens=0"),
        ("--stage sft --tokens-per-param 3", "--tokens-per-param=3.0"),
        ("--stage sft --epochs 0", "epochs=0.0"),
        ("--epochs 2", "--epochs=2.0 is not allowed: only with --stage sft"),
    ],
    "prepare": [
        ("--dataset ../x", "dataset='../x'"),
        ("--vocab-size 10", "vocab_size=10"),
        ("--vocab-size -1", "vocab_size=-1"),
        ("--sequence-len 7", "sequence_len=7"),
        ("--seed -1", "seed=-1"),
        ("--text ''", "text=('',)"),
        ("--tasks chain_sum:5", "--tasks=('chain_sum:5',) is not allowed: only with --stage sft"),
        ("--stage sft --text a.txt", "--text=('a.txt',) is not allowed: only with --stage base"),
        ("--stage sft --vocab-size 4096", "--vocab-size=4096"),
        ("--stage sft --tokenizer nothing", "tokenizer='nothing'"),
        ("--tokenizer nothing", "tokenizer='nothing' is no dataset, no run and no fingerprint"),
        ("--tokenizer x --vocab-size 300", "--vocab-size=300 is not allowed: not with --tokenizer"),
        ("--chats my.jsonl", "--chats=('my.jsonl',) is not allowed: only with --stage sft"),
        ("--stage sft --tokenizer ../x", "tokenizer='../x'"),
        ("--stage sft --tasks chain_sum", "tasks='chain_sum'"),
        ("--stage sft --tasks chain_sum:0", "tasks='chain_sum:0'"),
        ("--stage sft --tasks chain_sum:99999999999999", "with a count up to 100,000,000"),
        ("--stage sft --tasks", "tasks is empty"),
        ("--stage pretrain", "--stage='pretrain'"),
    ],
    "eval": [
        ("--run ../x", "run='../x'"),
        ("--run nothing", "has no checkpoint"),
        ("--checkpoint a/b", "checkpoint='a/b'"),
        ("--count 0", "count=0"),
        ("--count -1", "count=-1"),
        ("--engine.max-num-seqs 0", "max_num_seqs=0"),
        ("--slots 0", "unknown argument '--slots': it is now --engine.max-num-seqs"),
        ("--threads -1", "threads=-1"),
        ("--seed -1", "seed=-1"),
        ("--show-wrong -1", "show_wrong=-1"),
        ("--device tpu", "device='tpu'"),
        ("--device cuda:99", "device='cuda:99'"),
        ("--engine.precision int3", "--engine.precision='int3'"),
        ("--tasks nothing", "task='nothing'"),
    ],
    "export": [
        ("--import-from a --checkpoint best", "checkpoint='best' is not allowed: only with --out"),
        ("--run ..", "run='..'"),
        ("--run nothing --out x", "has no checkpoint"),
        ("--run nothing --checkpoint ../x --out x", "checkpoint='../x'"),
        ("--precision int8", "--precision='int8'"),
    ],
    "serve": [
        ("--no-ray --gpus 1", "gpus=1.0 is not allowed: this machine has no CUDA device"),
        ("--port 99999", "port=99999 is not allowed: a whole number from 1 to 65535"),
        ("--port 0", "port=0"),
        ("--port http", "--port='http'"),
        ("--run a/b", "run='a/b'"),
        ("--run nothing", "has no checkpoint"),
        ("--run nothing --no-ray", "has no checkpoint"),
        ("--checkpoint ../x", "checkpoint='../x'"),
        ("--num-replicas 0", "num_replicas=0"),
        ("--max-replicas -1", "max_replicas=-1"),
        ("--num-replicas 3 --max-replicas 2", "max_replicas=2"),
        ("--num-ingress-replicas 0", "num_ingress_replicas=0"),
        ("--gpus nan", "gpus=nan"),
        (
            "--gpus 1 --engine.precision int8",
            "precision='int8' is not allowed: fp32 or bf16 with gpus",
        ),
        ("--gpus -1", "gpus=-1.0"),
        ("--threads -1", "threads=-1"),
        ("--restarts -1", "restarts=-1"),
        ("--restarts 1 --no-block", "restarts=1 is not allowed: 0 with --no-block"),
        ("--engine.max-num-seqs 0", "max_num_seqs=0"),
        ("--engine.max-model-len -1", "max_model_len=-1"),
        ("--engine.max-num-batched-tokens -1", "max_num_batched_tokens=-1"),
        ("--engine.max-num-batched-tokens 3", "max_num_batched_tokens=3"),
        ("--engine.max-queue-size 0", "max_queue_size=0"),
        ("--request-timeout-s inf", "request_timeout_s=inf"),
        ("--max-num-seqs 8", "unknown argument '--max-num-seqs': it is now --engine.max-num-seqs"),
        ("--engines 2", "unknown argument '--engines': it is now --num-replicas"),
        ("--engine colour=red", "unknown argument '--engine colour=red'"),
        ("--engine kv_layout=paged", "it is now --engine.kv-layout paged"),
        ("--engine kv_memory=0.5", "it is now --engine.kv-cache-memory-fraction 0.5"),
        ("--engine.kv-cache-memory-fraction 2", "kv_cache_memory_fraction=2"),
        ("--engine.kv-layout heap", "--engine.kv-layout='heap' is not allowed: one of auto"),
    ],
    "chat": [
        ("--url localhost:8000", "url='localhost:8000'"),
        ("--temperature -1", "temperature=-1.0"),
        ("--temperature nan", "temperature=nan"),
        ("--top-k -2", "top_k=-2"),
        ("--max-tokens -1", "max_tokens=-1"),
        ("--url http://127.0.0.1:1 --once hi", "url=http://127.0.0.1:1 cannot be reached"),
    ],
    "quickstart": [
        ("--depth x", "--depth='x' is not allowed: a whole number"),
        ("--depth 0", "depth=0"),
        ("--colour", "unknown argument '--colour'"),
        ("--port", "--port needs a value"),
        ("--port 99999", "port=99999"),
        ("--text", "text=() is not allowed: one or more files"),
        ("--text ''", "text=('',)"),
        ("--minutes 0", "minutes=0.0"),
        ("--minutes soon", "--minutes"),
        ("--minutes 3 --gpus 1", "--minutes=3.0 is not allowed: only on a CPU"),
        ("--gpus -1", "gpus=-1"),
        ("--rl-steps -1", "rl_steps=-1"),
        ("--rl-steps 1 --gpus 1", "rl_steps=1 is not allowed: 0 with --gpus"),
        ("--stay --leave", "--stay=True is not allowed: not with --leave"),
        ("--storage ftp://x", "storage='ftp://x'"),
    ],
    "stop": [("--port 0", "port=0"), ("--port x", "--port='x'"), ("8000", "unknown argument")],
    "bench train": [("--only nothing", "only='nothing'"), ("--steps 0", "steps=0")],
    "bench gpu": [
        ("--part x", "part='x'"),
        ("--part nanochat", "checkout=''"),
        ("--max-seconds -1", "max_seconds=-1"),
    ],
    "bench learn": [("--depth 0", "depth=0"), ("--datasets ../x", "datasets='../x'")],
    "bench learning-rates": [
        ("--scales 0", "scales=0.0"),
        ("--dataset nothing", "dataset='nothing'"),
    ],
    "bench serve": [("--concurrency 0", "concurrency=0"), ("--rate nan", "rate=nan")],
    "bench offline": [
        ("--batches 0", "batches=0"),
        ("--repeats 0", "repeats=0"),
        ("--engine.kv-layout x", "kv-layout='x'"),
    ],
}
WITHOUT_STORAGE = (
    "stop",
    "quickstart",
    "chat",
    "bench gpu",
    "bench train",
    "bench learn",
    "bench serve",
    "bench offline",
)


@pytest.mark.slow
@pytest.mark.parametrize("job", BAD_FLAGS)
def test_a_wrong_flag_is_one_line(job: str, root: Store) -> None:
    storage = () if job in WITHOUT_STORAGE else ("--storage", root.uri)
    for line, message in BAD_FLAGS[job]:
        assert message in refusal(job, *storage, *shlex.split(line)), line
    assert not Path(root.root).exists()


def test_gpus_need_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "gpus=True" in refusal("train", "--no-ray", "--gpus")
    assert "name what to plan for with --hardware" in refusal("train", "--gpus", "--plan-only")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # torchrun's
    assert "this machine has no CUDA device" in refusal("train", "--gpus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "has 2 CUDA devices for 3 workers" in refusal("train", "--gpus")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("softcap", float("nan")), ("rope_base", 0.0), ("norm_eps", -1.0)),
        *(("qk_scale", float("inf")), ("n_head", 0)),
    ],
)
def test_fields_of_the_model_are_bounded(name: str, value: float) -> None:
    fields = {"vocab_size": 300, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    with pytest.raises(ValueError, match=name):
        ModelConfig(**{**fields, "sequence_len": 64, name: value})


def test_fields_of_the_optimizer_are_bounded() -> None:
    for name, value in (
        *(("grad_clip", -1.0), ("weight_decay", -1.0)),
        *(("matrix_lr", float("inf")), ("momentum", float("nan"))),
    ):
        with pytest.raises(ValueError, match=name):
            OptimConfig(**{name: value})
    with pytest.raises(ValueError, match="kv_cache_memory_fraction"):
        EngineConfig(kv_cache_memory_fraction=float("nan"))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "../a",
            "a\\b",
            "a b",
            "-a",
            ".a",
            "a\n",
            "a\0",
            "é",
            "x.tmp",
        ),
        *("a" * 129, None, 3),
    ],
)
def test_a_name_is_one_entry_of_a_folder(name: Any, root: Store) -> None:
    with pytest.raises(ValueError, match=r"run=.* is not allowed"):
        check_name("run", name)
    with pytest.raises(ValueError, match=r"name=.* is not allowed"):
        root.child("runs", name)


def test_names_that_are_in_use_stay_allowed() -> None:
    for name in ("base-d4-1234", "step-000100", "chat_2.1", "d20", "0", "_x"):
        assert check_name("run", name) == name


def test_long_values_are_shortened() -> None:
    with pytest.raises(ValueError, match="run=") as caught:
        check_name("run", "x" * 1_000_000)
    assert len(str(caught.value)) < 400
    assert len(short_repr(list(range(10_000)))) < 200
    for wrong in (True, "3", 2.0, None):
        with pytest.raises(ValueError, match="n="):
            check_int("n", wrong, 1)
    for wrong in (True, "3", float("inf"), None):
        with pytest.raises(ValueError, match="x="):
            check_float("x", wrong)


def _raise(error: BaseException) -> Callable[[Any], None]:
    def main(_: Any) -> None:
        raise error

    return main


ERRORS = [
    (ValueError("run='x' has\nno checkpoint"), 2, "error: run='x' has no checkpoint"),
    (OSError(errno.ENOSPC, "No space left on device", "/full/x"), 2, "/full/x: No space left"),
    (OSError(errno.EROFS, "Read-only file system", "/ro"), 2, "/ro: Read-only file system"),
    (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "/root/x: Permission"),
    (pa.ArrowInvalid("Parquet magic bytes not found"), 2, "Parquet magic bytes"),
    (pa.ArrowNotImplementedError("codec lz9"), 2, "codec lz9"),
    (FloatingPointError("the loss is nan at step 3"), 1, "the loss is nan at step 3"),
    (ModuleNotFoundError("No module named 'wandb'", name="wandb"), 2, "install the package wandb"),
    (ConnectionError("Ray cannot be reached"), 2, "Ray cannot be reached"),
    (ValueError("x" * 10_000), 2, " … "),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("error", "status", "line"), ERRORS, ids=lambda v: type(v).__name__)
def test_an_expected_error_is_one_line(error: BaseException, status: int, line: str) -> None:
    from nanochat_ray.cli.chat import Args

    code, stderr = exit_of(_raise(error), Args)
    assert code == status
    assert line in stderr
    assert len(stderr.splitlines()) == 1
    assert len(stderr) < 2100


def test_a_defect_keeps_its_traceback() -> None:
    from nanochat_ray.cli.chat import Args

    for defect in (KeyError("x"), TypeError("y"), AssertionError("z"), RuntimeError("w")):
        with pytest.raises(type(defect)):
            entry.run(_raise(defect), Args, None, [])


def test_a_worker_s_error_is_unwrapped() -> None:
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    own = ValueError("shard x is damaged")
    inside = UserExceptionWithTraceback(own, "Traceback …")
    for error in (
        RayTaskError("f", "Traceback …", own),
        WorkerGroupError("two lines\nof it", {1: inside}),
        ControllerError(own),
        ControllerError(WorkerGroupError("", {0: inside})),
    ):
        assert entry.explain(error) == "shard x is damaged"
    assert entry.explain(RayTaskError("f", "Traceback …", KeyError("x"))) is None


def test_a_reader_that_leaves_ends_the_job_quietly(root: Store) -> None:
    write_dataset(root, "base")
    code = (
        "import sys; sys.argv[0] = 'job'\n"
        "from nanochat_ray.cli.chat import Args\n"
        "from nanochat_ray.cli import entry\n"
        "entry.run(lambda _: [print('x' * 100) for _ in range(10_000)] and None, Args, None)\n"
    )
    result = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -n 1', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("flags", ["--help", "stop --help"])
def test_help_without_a_reader_ends_quietly(flags: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "nanochat_ray", *flags.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


COMMANDS_WITH_FLAGS = [c for c in cli.COMMANDS if c != "bench"]


@pytest.mark.parametrize("command", COMMANDS_WITH_FLAGS)
def test_help_fits_one_screen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(cli.module_of(command))
    for word in ("--help", "-h"):
        with pytest.raises(SystemExit) as exit_:
            entry.run(_raise(KeyError()), module.Args, module.__doc__, [word])
        assert exit_.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 45
        assert max(map(len, lines)) <= 100
        assert not [line for line in lines if "…" in line]
        assert lines[2] == module.__doc__.splitlines()[0].replace("``", "")
        texts = [line[31:] for line in lines if line.startswith("  --")]
        assert all(texts), "a flag without a description"


def test_help_all_has_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS_WITH_FLAGS:
        module = importlib.import_module(cli.module_of(command))
        with pytest.raises(SystemExit) as exit_:
            entry.run(_raise(KeyError()), module.Args, module.__doc__, ["--help-all"])
        assert exit_.value.code == 0
        text = capsys.readouterr().out
        for flag in flags.all_flags(module.Args):
            assert f"{flag.name} " in text or f"{flag.name}," in text, flag.name


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import importlib, sys\n"
        "from nanochat_ray import cli\n"
        "for command in cli.COMMANDS:\n"
        "    importlib.import_module(cli.module_of(command))\n"
        "    assert not {'torch', 'ray'} & set(sys.modules), command\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=REPO)


def test_usage_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["-h"], ["--help"]):
        with pytest.raises(SystemExit) as exit_:
            entry.dispatch("p", {"a": "One.", "long": "Two."}, argv, cli.module_of)
        assert exit_.value.code == 0
        assert capsys.readouterr().out.splitlines() == [
            *("usage: p COMMAND [flags]", "", "  a     One.", "  long  Two.", ""),
            "p COMMAND --help shows the flags of a command.",
        ]


def test_the_status_is_that_of_the_command() -> None:
    from nanochat_ray.cli.chat import Args

    for code, status, line in (
        *((0, 0, ""), (None, 0, ""), (75, 75, ""), (3, 3, "")),
        ("Ray died", 1, "Ray died\n"),
    ):
        assert exit_of(_raise(SystemExit(code)), Args) == (status, line)
        if not isinstance(code, str):
            assert exit_of(lambda args, code=code: code, Args) == (status, "")


def test_a_terminal_that_lacks_a_character_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanochat_ray.cli.chat import Args

    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="latin-1"))
    assert exit_of(lambda args: print("3 × 4 → 12"), Args) == (0, "")
    assert output.getvalue() == b"3 \xd7 4 ? 12\n"


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, line in (
        (["fly"], "error: nanochat-ray has no command 'fly': one of prepare, "),
        (["bench", "fly"], "error: nanochat-ray bench has no command 'fly': one of offline, "),
        (["chat", "--colour"], "error: unknown argument '--colour': see --help"),
    ):
        with pytest.raises(SystemExit) as exit_:
            entry.dispatch("nanochat-ray", cli.COMMANDS, argv, cli.module_of)
        assert exit_.value.code == 2
        assert capsys.readouterr().err.startswith(line)


def test_flags_override_what_is_derived() -> None:
    from nanochat_ray.cli import serve, train

    argv = ["--model.window-pattern", "SSL", "--model.skips", "--model.norm-eps", "1e-6"]
    argv += ["--optim.momentum", "0.9", "--optim.no-normuon", "--fp8", "--seed", "3"]
    args = entry.parse(train.Args, None, argv)
    assert args.model == {"window_pattern": "SSL", "skips": True, "norm_eps": 1e-6}
    assert args.optim == {"momentum": 0.9, "normuon": False}
    assert args.train == {"fp8": True, "seed": 3}
    assert entry.parse(train.Args, None, []).model == {}
    config = serve.config_of(entry.parse(serve.Args, None, ["--engine.max-num-seqs", "200"]))
    assert config.engine.max_num_seqs == 200
    assert config.engine.max_num_batched_tokens == 400
    argv = ["--gpus", "1", "--engine.precision", "fp32", "--engine.max-num-batched-tokens", "300"]
    engine = serve.config_of(entry.parse(serve.Args, None, argv)).engine
    assert (engine.precision, engine.max_num_batched_tokens) == ("fp32", 300)
    argv = ["--gpus", "1", "--num-replicas", "2", "--allowed-origins", "https://a.example"]
    config = serve.config_of(entry.parse(serve.Args, None, argv))
    assert (config.engine.precision, config.num_replicas) == ("bf16", 2)
    assert (config.engine.max_num_seqs, config.engine.max_num_batched_tokens) == (256, 8192)
    assert config.engine.prefill_chunk == 512
    assert config.allowed_origins == ("https://a.example",)


def test_no_stage_replaces_a_dataset_of_another(root: Store) -> None:
    for kind, other in (("base", "sft"), ("sft", "base")):
        write_dataset(root, kind, kind)
        before = root.read_bytes(f"datasets/{kind}/manifest.json")
        flags = ("--storage", root.uri, "--stage", other, "--dataset", kind)
        line = refusal("prepare", *flags)
        assert f"dataset='{kind}' is not allowed: it was prepared for stage {kind}" in line
        assert root.read_bytes(f"datasets/{kind}/manifest.json") == before


def test_a_folder_that_cannot_be_written_is_named(root: Store) -> None:
    """/proc takes no files from anybody, root included."""
    TOKENIZER.save(root.child("tokenizers", TOKENIZER.fingerprint[:16]))
    with pytest.raises(OSError, match="/proc/no") as caught:
        Store.at("/proc/no").write_text("x", "y")
    message = entry.explain(caught.value)
    assert message is not None
    assert "/proc/no" in message
