"""The 22 tasks of the CORE metric (Li et al., DCLM, arXiv 2406.11794), and where their files are.

Shots, delimiters and random baselines are those of mlfoundations/dclm (``eval/``, commit 361714b),
which nanochat uses too.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat_ray.checks import short_repr
from nanochat_ray.storage import sync_folder

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""All files in one archive, as nanochat publishes it."""
Kind = Literal["multiple_choice", "schema", "language_modeling"]
Example = dict[str, Any]
ANSWER = "\nAnswer: "


@dataclass(frozen=True)
class CoreTask:
    label: str
    file: str
    """Name of the file with an example in each line."""
    kind: Kind
    """``multiple_choice``: one query, several continuations. ``schema``: several contexts, one
    continuation. ``language_modeling``: one continuation, which greedy decoding must give."""
    num_shots: int
    """Examples with their answers before each question."""
    baseline: float = 0.0
    """Accuracy of random answers."""
    delimiter: str = " "
    """Between a query and its continuation."""


_CHOICE: Kind = "multiple_choice"
_LM: Kind = "language_modeling"
TASKS = (
    CoreTask("hellaswag_zeroshot", "hellaswag.jsonl", _CHOICE, 0, 0.25),
    CoreTask("jeopardy", "jeopardy_all.jsonl", _LM, 10, 0.0, ANSWER),
    CoreTask("bigbench_qa_wikidata", "bigbench_qa_wikidata.jsonl", _LM, 10),
    CoreTask("arc_easy", "arc_easy.jsonl", _CHOICE, 10, 0.25, ANSWER),
    CoreTask("arc_challenge", "arc_challenge.jsonl", _CHOICE, 10, 0.25, ANSWER),
    CoreTask("copa", "copa.jsonl", _CHOICE, 0, 0.5),
    CoreTask("commonsense_qa", "commonsense_qa.jsonl", _CHOICE, 10, 0.403),
    CoreTask("piqa", "piqa.jsonl", _CHOICE, 10, 0.5, ANSWER),
    CoreTask("openbook_qa", "openbook_qa.jsonl", _CHOICE, 0, 0.25),
    CoreTask("lambada_openai", "lambada_openai.jsonl", _LM, 0),
    CoreTask("hellaswag", "hellaswag.jsonl", _CHOICE, 10, 0.25),
    CoreTask("winograd", "winograd_wsc.jsonl", "schema", 0, 0.5),
    CoreTask("winogrande", "winogrande.jsonl", "schema", 0, 0.5),
    CoreTask("bigbench_dyck_languages", "bigbench_dyck_languages.jsonl", _LM, 10),
    CoreTask("agi_eval_lsat_ar", "agi_eval_lsat_ar.jsonl", _CHOICE, 3, 0.25),
    CoreTask("bigbench_cs_algorithms", "bigbench_cs_algorithms.jsonl", _LM, 10),
    CoreTask("bigbench_operators", "bigbench_operators.jsonl", _LM, 10),
    CoreTask("bigbench_repeat_copy_logic", "bigbench_repeat_copy_logic.jsonl", _LM, 10),
    CoreTask("squad", "squad.jsonl", _LM, 10),
    CoreTask("coqa", "coqa.jsonl", _LM, 0),
    CoreTask("boolq", "boolq.jsonl", _CHOICE, 10, 0.62, ANSWER),
    CoreTask(
        "bigbench_language_identification",
        "bigbench_language_identification.jsonl",
        _CHOICE,
        10,
        0.25,
    ),
)
MAX_SHOTS = max(task.num_shots for task in TASKS)
_FIELDS: dict[Kind, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


def find_files(source: str, cache: Path) -> dict[str, Path]:
    """Paths of the tasks' files by name.

    ``source`` is a folder that has them at any depth, a .zip with them, or "bundle": the published
    archive, which is downloaded once into ``cache``. ValueError if none is there.
    """
    folder = Path(source)
    if source == "bundle":
        folder = _unpack(_download(cache), cache)
    elif folder.suffix == ".zip":
        if not folder.is_file():
            raise ValueError(f"core={source!r} is not allowed: there is no such file")
        folder = _unpack(folder, cache)
    names = {task.file for task in TASKS}
    paths = {path.name: path for path in sorted(folder.rglob("*.jsonl")) if path.name in names}
    if not paths:
        requirement = "a folder or .zip with files such as arc_easy.jsonl, or bundle"
        raise ValueError(f"core={source!r} is not allowed: {requirement}")
    return paths


def _download(cache: Path) -> Path:
    path = cache / "eval_bundle.zip"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        partial = Path(temporary) / path.name
        try:
            with (
                urllib.request.urlopen(BUNDLE_URL, timeout=60) as response,
                partial.open("wb") as out,
            ):
                shutil.copyfileobj(response, out)
                out.flush()
                os.fsync(out.fileno())
            # The end of a cut connection looks like the end of the file; a zip's index is there.
            if not zipfile.is_zipfile(partial):
                raise OSError("what came is no whole .zip")
        except (OSError, http.client.HTTPException) as error:
            reason = f"{BUNDLE_URL} cannot be downloaded ({error}); name a folder or .zip"
            raise ValueError(f"core='bundle' is not allowed: {reason}") from None
        partial.rename(path)
        sync_folder(cache)
    return path


def _unpack(archive: Path, cache: Path) -> Path:
    """The tasks' files of an archive, in a folder of its content's name."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()[:16]
    folder = cache / f"core-{digest}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    names = {task.file for task in TASKS}
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        unpacked_files = Path(temporary) / "files"
        unpacked_files.mkdir()
        try:
            with zipfile.ZipFile(archive) as file:
                for entry in file.infolist():
                    # Only the last part of a name is used, so none leads out of the folder.
                    name = entry.filename.rsplit("/", 1)[-1]
                    if name in names:
                        (unpacked_files / name).write_bytes(file.read(entry))
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
            raise ValueError(f"core={str(archive)!r} is not allowed: {error}") from None
        # In one step: a folder with a part of the files would be taken for all of them.
        try:
            unpacked_files.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    return folder


def load(task: CoreTask, path: Path) -> list[Example]:
    """The examples of a task. ValueError names the file, the line and the field."""
    examples = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                example = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {error}") from None
            _check(task, example, where)
            examples.append(example)
    if len(examples) <= task.num_shots:
        raise ValueError(f"{path}: {len(examples)} examples, but {task.num_shots} shots are needed")
    return examples


def _check(task: CoreTask, example: Any, where: str) -> None:
    if not isinstance(example, dict):
        raise ValueError(f"{where}: {short_repr(example)} is not allowed: an object")
    for name, kind in _FIELDS[task.kind].items():
        if not isinstance(example.get(name), kind):
            value = short_repr(example.get(name))
            raise ValueError(f"{where}: {name}={value} is not allowed: {kind.__name__}")
    if task.kind == "language_modeling":
        return
    options = example["choices" if task.kind == "multiple_choice" else "context_options"]
    if not all(isinstance(text, str) for text in options):
        raise ValueError(f"{where}: {short_repr(options)} is not allowed: a list of texts")
    if not 0 <= example["gold"] < len(options):
        value = example["gold"]
        raise ValueError(f"{where}: gold={value} is not allowed: the index of one of the texts")
