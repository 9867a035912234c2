"""README's first command on a folder of text, at its smallest, until the model answers."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import psutil
import pytest

from nanochat_ray.cli import chat, entry, quickstart, quickstart_jobs, quickstart_plan
from nanochat_ray.cli.quickstart import Args, learn, tag, text_state
from nanochat_ray.cli.quickstart_jobs import Jobs, user_line
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray import ports
from nanochat_ray.on_ray.local_cluster import LocalCluster
from nanochat_ray.storage import Store
from tests.processes import have_ended
from tests.tiny import free_ports, save_model, tiny_config
from tests.waiting import wait_for

REPO = Path(__file__).parents[2]


def command(name: str, home: Path, *flags: str, seconds: float) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment.update(
        PYTHONPATH=str(REPO), XDG_STATE_HOME=str(home), NANOCHAT_OBJECT_STORE="200000000"
    )
    return subprocess.run(
        [sys.executable, "-m", "nanochat_ray", name, *flags],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=seconds,
        env=environment,
        check=False,
    )


def processes(port: int) -> list[int]:
    pids = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("NANOCHAT_CLUSTER") == f"nanochat_ray-{port}":
                pids.append(process.pid)
        except psutil.Error:
            continue
    return pids


def test_a_new_file_is_another_run(tmp_path: Path) -> None:
    """What names the runs changes with the files of a folder, and with nothing else."""
    (tmp_path / "a.txt").write_text("one")
    names = (str(tmp_path), "hf://datasets/x/y.parquet")
    state = text_state(names)
    assert "hf://datasets/x/y.parquet" in state
    assert text_state(names) == state
    one = tag(Args(text=names))
    (tmp_path / "b.txt").write_text("two")
    assert text_state(names) != state
    assert tag(Args(text=names)) != one
    assert tag(Args()) == "d4"
    assert tag(Args(depth=3, minutes=0.5)) == "d3-0.5m"


@pytest.mark.parametrize("gpus", [0, 8])
def test_the_stages_have_valid_flags(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    stages: list[tuple[str, Any]] = []

    def parse(self: Jobs, name: str, command: str, *flags: str, may_fail: bool = False) -> bool:
        module = importlib.import_module(f"nanochat_ray.cli.{command}")
        monkeypatch.setattr(module, "check_device", lambda *_: None, raising=False)
        stages.append((name, entry.parse(module.Args, None, ["--storage", self.storage, *flags])))
        return True

    monkeypatch.setattr(Jobs, "_run", parse)
    jobs = Jobs(LocalCluster(7), str(tmp_path), "d4", gpus=gpus)
    minutes = None if gpus else 2.5
    jobs.prepare_base(["my/books"])
    jobs.train_base(4, minutes)
    jobs.prepare_sft()
    jobs.train_sft(None, None if gpus else 1.3)
    jobs.train_sft(minutes, 2.0)
    jobs.train_rl("rl-d4", 40)
    jobs.serve("rl-d4", 8001)
    jobs.evaluate("rl-d4")
    names = ["prepare-base", "train-base", "prepare-sft", "train-sft", "train-sft", "rl", "serve"]
    assert [name for name, _ in stages] == [*names, "eval-rl-d4"]
    prepare, base, _, sft, sft_by_time, rl, serve, evaluation = (args for _, args in stages)
    assert (prepare.dataset, prepare.text) == ("base-d4", ("my/books",))
    assert (base.run, base.depth, base.cpu_minutes, base.workers) == (
        *("base-d4", 4, minutes),
        gpus or 2,
    )
    assert (sft.run, sft.parent, sft.gpus) == ("chat-d4", "base-d4", bool(gpus))
    assert (sft.cpu_minutes, sft.epochs) == (None, None if gpus else 1.3)
    assert (sft_by_time.cpu_minutes, sft_by_time.epochs) == (minutes, 2.0)
    assert (rl.run, rl.parent, rl.steps, rl.train["eval_every"]) == ("rl-d4", "chat-d4", 40, 40)
    assert rl.workers == (gpus or 2)
    assert (serve.config["run"], evaluation.run) == ("rl-d4", "rl-d4")
    assert (serve.port, serve.block, serve.config["name"]) == (8001, False, "chat-d4")
    assert evaluation.engine == ({"precision": "bf16"} if gpus else {})


def test_paths_are_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in another folder."""
    monkeypatch.chdir(tmp_path)
    args = Args(text=("a.txt", "/b/*.txt", "s3://bucket/c.txt"))
    assert args.text == (f"{tmp_path}/a.txt", "/b/*.txt", "s3://bucket/c.txt")


def test_ray_s_own_lines_stay_in_the_log() -> None:
    for line, text in (
        ("2026-11-26 03:00:00,123\tINFO cli.py:39 -- Job submission server address\n", None),
        (
            "\x1b[36m(RayTrainWorker pid=12, ip=127.0.0.1)\x1b[0m step 3 loss 2.1\n",
            "step 3 loss 2.1",
        ),
        ("(map_tasks pid=12) ip=127.0.0.1 something\n", None),
        ("Tailing logs until the job exits\n", None),
        ("-----\n", None),
        ("trained in 3 s\n", "trained in 3 s"),
    ):
        assert user_line(line) == text


@pytest.mark.parametrize(("minutes", "tuning"), [(0.1, 0.1), (1.5, 1.5), (3.0, 2.0), (30.0, 15.0)])
def test_fine_tuning_follows_the_minutes_of_base_training(
    root: Store, monkeypatch: pytest.MonkeyPatch, minutes: float, tuning: float, stages: Any
) -> None:
    monkeypatch.setattr(quickstart, "run_is_complete", lambda storage, run: False)
    quickstart.train(Args(storage=root.uri, minutes=minutes), stages, 0.0)
    assert ("train_base", 4, minutes) in stages.calls
    assert ("train_sft", tuning, 2.0) in stages.calls


def test_the_fine_tuned_model_is_served_if_rl_fails(
    root: Store, stages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.monotonic()
    stages.train_rl = lambda run, steps: False
    assert learn(Args(storage=root.uri), stages, now) == "chat-d4"
    assert "serving run chat-d4, as it was fine-tuned" in capsys.readouterr().out
    stages.train_rl = lambda run, steps: stages.calls.append((run, steps)) or True
    assert learn(Args(storage=root.uri), stages, now) == "rl-d4"
    assert learn(Args(storage=root.uri, rl_steps=7), stages, now) == "rl7-d4"
    assert learn(Args(storage=root.uri, minutes=3.0), stages, now) == "rl50-d4"
    assert stages.calls == [
        *(("rl-d4", 50), ("forget_eval", "rl-d4")),
        *(("rl7-d4", 7), ("forget_eval", "rl7-d4")),
        *(("rl50-d4", 50), ("forget_eval", "rl50-d4")),
    ]
    assert learn(Args(storage=root.uri, rl_steps=0), stages, now) == "chat-d4"
    assert learn(Args(storage=root.uri, gpus=1), stages, now) == "chat-d4"


class Stages:
    """In place of ``Jobs``: remembers the stages, in order, and runs none."""

    tag, base_run, chat_run = "d4", "base-d4", "chat-d4"

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def log(self, name: str) -> str:
        return name

    rl_run = Jobs.rl_run

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append((name, *args))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Any:
    result = Stages()
    monkeypatch.setattr(
        chat, "main", lambda args: result.calls.append(("ask", args.url, args.once))
    )
    return result


@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("is_trained", [False, True])
def test_no_stage_that_is_complete_runs_twice(
    root: Store, monkeypatch: pytest.MonkeyPatch, stages: Any, gpus: int, is_trained: bool
) -> None:
    monkeypatch.setattr(quickstart, "run_is_complete", lambda storage, run: is_trained)
    quickstart.train(Args(storage=root.uri, gpus=gpus), stages, time.monotonic())
    # Nothing has taken any time: as for the smallest text, and with no log of base training.
    base = [("prepare_base", ()), ("train_base", 4, None if gpus else 5.0)]
    assert stages.calls == [
        *([] if is_trained else base),
        ("prepare_sft",),
        ("train_sft", None, None if gpus else 1.0),
        ("forget_eval", "chat-d4"),
    ]


def test_each_stage_is_planned_when_it_begins(
    root: Store, monkeypatch: pytest.MonkeyPatch, stages: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Base training at 10,500 tokens/s; then the machine loses a third of its speed."""
    monkeypatch.setattr(quickstart, "run_is_complete", lambda storage, run: False)
    facts = [(45, 45, 0), (350, 100, 10_500), (530, 170, 5000)]
    measurements: list[Any] = []

    def measure(clock: float, *runs: Store) -> quickstart_plan.Progress:
        elapsed_s, other_s, rate = facts[len(runs)]
        measurements.append((clock, *(run.uri.rpartition("/")[2] for run in runs)))
        return quickstart_plan.Progress(elapsed_s=elapsed_s, other_s=other_s, tokens_per_s=rate)

    monkeypatch.setattr(quickstart_plan, "measure", measure)
    stages.train_rl = lambda run, steps: stages.calls.append((run, steps)) or True
    args = Args(storage=root.uri)
    for _ in range(2):  # a resumed one keeps its plan, whatever is measured then
        stages.calls.clear()
        assert quickstart.train(args, stages, 7.0) == 7.0
        assert learn(args, stages, 7.0) == "rl-d4"
        assert ("train_base", 4, 3.7) in stages.calls
        assert ("train_sft", 2.9, 1.4) in stages.calls
        assert ("rl-d4", 25) in stages.calls
        facts = [(10, 10, 0), (20, 20, 10_500), (10, 10, 4000)]
    assert measurements[:3] == [(7.0,), (7.0, "base-d4"), (7.0, "base-d4", "chat-d4")]
    lines = [line for line in capsys.readouterr().out.splitlines() if "planned" not in line]
    for text, line in zip(
        (
            "2/6 training the base model for 3.7 minutes, then 1.0 passes to chat and up to",
            "4/6 fine-tuning to chat in 1.4 passes, not 1.0: 5.7 minutes are left, 10,500 tokens/s",
            "5/6 learning from graded answers in 25 steps, not 50: 2.7 minutes are left, 5,000 tok",
        ),
        (line for line in lines if any(f"{n}/6" in line for n in (2, 4, 5))),
        strict=True,
    ):
        assert text in line


def test_preparing_the_users_text_does_not_count(
    root: Store, monkeypatch: pytest.MonkeyPatch, stages: Any
) -> None:
    monkeypatch.setattr(quickstart, "run_is_complete", lambda storage, run: False)
    start = time.monotonic() - 1000
    args = Args(storage=root.uri, text=("/a",))
    assert quickstart.train(args, stages, start) >= start + 1000
    assert stages.calls[:2] == [("prepare_base", ("/a",)), ("train_base", 4, 5.0)]


@pytest.mark.parametrize("gpus", [0, 8])
def test_a_gpu_is_measured_before_it_serves(
    monkeypatch: pytest.MonkeyPatch, stages: Any, gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart.time, "monotonic", lambda: 785.0)
    quickstart.serve(Args(gpus=gpus, port=8001), stages, "rl-d4", 100.0)
    url = "http://127.0.0.1:8001"
    steps = [
        ("serve", "rl-d4", 8001),
        *(("ask", url, question) for question in quickstart.QUESTIONS),
    ]
    evaluation = [("evaluate", "rl-d4")]
    assert stages.calls == (evaluation + steps if gpus else steps + evaluation)
    output = capsys.readouterr().out
    assert f"done in 11:25; the chat page: {url}" in output
    assert f"base_url={url}/v1, model=chat-d4" in output


def test_a_run_is_complete_at_its_last_step(root: Store) -> None:
    assert not quickstart.run_is_complete(root.uri, "base")
    model = GPT(tiny_config())
    for step, is_complete in ((1, False), (2, True), (3, True)):
        save_model(root.child("runs", "base"), step, model, train_config={"steps": 2})
        assert quickstart.run_is_complete(root.uri, "base") is is_complete


@pytest.mark.parametrize("is_trained", [False, True])
def test_the_stages_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_trained: bool
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    calls: list[Any] = []
    looks = iter((False, True, True, False))  # at the start, and while it stays
    monkeypatch.setattr(LocalCluster, "is_alive", lambda cluster: next(looks))
    monkeypatch.setattr(LocalCluster, "start", lambda cluster, gpus: calls.append("start"))
    monkeypatch.setattr(LocalCluster, "stop", lambda cluster: calls.append("stop") or 2)
    monkeypatch.setattr(quickstart, "run_is_complete", lambda storage, run: is_trained)
    monkeypatch.setattr(quickstart, "train", lambda *args: calls.append("train") or 5.0)
    monkeypatch.setattr(quickstart, "learn", lambda args, jobs, clock: f"run of {jobs.tag}")
    monkeypatch.setattr(quickstart, "serve", lambda args, jobs, run, start: calls.append(run))
    monkeypatch.setattr(quickstart.time, "sleep", lambda seconds: calls.append("wait"))
    stages = ["start", *([] if is_trained else ["train"]), "run of d4"]
    try:
        with pytest.raises(ValueError, match="Ray has ended by itself"):
            quickstart.main(Args(storage=str(tmp_path), port=7, stay=True))
        assert calls == [*stages, "wait", "wait", "stop"]
        calls.clear()
        looks = iter((False,))
        quickstart.main(Args(storage=str(tmp_path), port=7, leave=True))
        assert calls == stages
        with pytest.raises(SystemExit) as end:
            signal.raise_signal(signal.SIGTERM)
        assert end.value.code == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("is_up", [False, True])
def test_only_a_cluster_of_its_own_ends_with_an_error(is_up: bool) -> None:
    class Cluster:
        port = 1

        def __init__(self) -> None:
            self.calls: list[Any] = []

        def is_alive(self) -> bool:
            return is_up

        def variables(self) -> dict[str, str]:
            return {"RAY_API_SERVER_ADDRESS": "a"}

        def start(self, gpus: int) -> None:
            self.calls.append(gpus)

        def stop(self) -> int:
            self.calls.append("stop")
            return 1

    cluster: Any = Cluster()
    with quickstart._cluster_for(cluster, 3):
        assert cluster.calls == ([] if is_up else [3])
    with pytest.raises(KeyboardInterrupt), quickstart._cluster_for(cluster, 3):
        raise KeyboardInterrupt
    assert cluster.calls == ([] if is_up else [3, 3, "stop"])


def test_stop_ends_only_its_own_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    # Two processes that end with their pipe; the second has another environment, as Ray's seem to.
    # The first outlives the second, which may be ended first.
    run = "subprocess.run([sys.executable, '-c', 'input()'], env={})"
    idle = [sys.executable, "-c", f"import subprocess, sys; {run}; input()"]
    # Ports that the tests of another checkout do not have.
    one, other = (LocalCluster(100_000 + 2 * os.getpid() + i) for i in range(2))
    children = [
        subprocess.Popen(
            idle,
            stdin=subprocess.PIPE,
            env={**os.environ, "NANOCHAT_CLUSTER": f"nanochat_ray-{c.port}"},
        )
        for c in (one, other)
    ]
    try:
        wait_for(lambda: (len(one.processes()), len(other.processes())) == (2, 2))
        of_one, of_other = one.processes(), other.processes()
        assert psutil.Process(children[0].pid) in of_one
        assert not one.is_alive()
        assert one.stop() == 2
        assert have_ended(of_one)
        assert children[0].wait(60) == -signal.SIGTERM
        assert children[1].poll() is None
        assert other.processes() == of_other
        assert one.stop() == 0
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_the_address_is_the_user_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    cluster = LocalCluster(7)
    cluster.folder.mkdir(parents=True)
    flags = cluster._choose_address()
    variables = cluster.variables()
    shutil.rmtree(variables[ports.STATE_BASE])
    assert (cluster.folder / "address").stat().st_mode & 0o777 == 0o600
    assert variables["RAY_AUTH_MODE"] == "token"
    assert len(variables["RAY_AUTH_TOKEN"]) == 64
    assert flags[0] == f"--port={variables['RAY_ADDRESS'].rpartition(':')[2]}"
    assert cluster.environment()["NANOCHAT_CLUSTER"] == "nanochat_ray-7"
    # A shell can source it.
    script = f". {cluster.folder / 'address'}; echo $RAY_AUTH_TOKEN"
    shell = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert shell.stdout.strip() == variables["RAY_AUTH_TOKEN"]


def test_an_evaluation_that_failed_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster: Any = SimpleNamespace(logs=tmp_path, environment=lambda: None)
    jobs = Jobs(cluster, str(tmp_path), "d4", gpus=0)
    monkeypatch.setattr(quickstart_jobs, "RAY", ["false"])
    with pytest.raises(SystemExit):
        jobs.evaluate("r")
    assert os.listdir(tmp_path) == ["eval-r-failed.log"]
    monkeypatch.setattr(quickstart_jobs, "RAY", ["true"])
    jobs.evaluate("r")
    assert sorted(os.listdir(tmp_path)) == ["eval-r-failed.log", "eval-r.log"]


def test_the_scripts_are_valid() -> None:
    for name in ("quickstart", "stop", "environment", "check"):
        subprocess.run(["bash", "-n", str(REPO / "cluster" / f"{name}.sh")], check=True)


@pytest.mark.ray
@pytest.mark.timeout(1300)
def test_from_a_folder_of_text_to_an_answer(tmp_path: Path) -> None:
    text, storage = tmp_path / "text", tmp_path / "storage"
    text.mkdir()
    for path in REPO.glob("nanochat_ray/*/*.py"):
        shutil.copy(path, text / f"{path.parent.name}-{path.stem}.txt")
    (port,) = free_ports(1)
    flags = ("--storage", str(storage), "--depth", "1", "--minutes", "0.1")
    flags += ("--rl-steps", "0", "--port", str(port), "--leave")
    try:
        first = command("quickstart", tmp_path, *flags, "--text", str(text), seconds=480)
        assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-2000:]
        for message in (
            "bits per byte of the validation split",
            "chain_sum",
            "the chat page:",
            "Who are you?",
        ):
            assert message in first.stdout
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        (model,) = client.models.list().data
        assert model.id.startswith("chat-d1-")
        # Six seconds of training may well have taught it to answer nothing: what it says depends on
        # the machine's speed.
        answer = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": "Who are you?"}],
            temperature=0,
            max_tokens=40,
        )
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.usage
        assert 1 <= answer.usage.completion_tokens <= 40

        again = command("quickstart", tmp_path, *flags, "--text", str(text), seconds=480)
        assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-2000:]
        assert "is trained already" in again.stdout
    finally:
        result = command("stop", tmp_path, "--port", str(port), seconds=240)
    assert result.returncode == 0
    assert not processes(port)
