"""The default corpus: the documentation on any machine that can run this program.

Docstrings of the standard library and of the packages that the project depends on: English about
code, up to 25 MB. A document is one module: its docstrings in the order of the source, each after
the signature of what it describes. Test files and files with little documentation are left out.
Nothing is imported: the sources are parsed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import inspect
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanochat_ray.data import sources
from nanochat_ray.data.decoding import replace_surrogates
from nanochat_ray.data.map_tasks import MapTasks, TaskResult
from nanochat_ray.data.progress import log, run_with_progress
from nanochat_ray.storage import Store

MIN_DOCSTRING = 40
"""Shorter docstrings, in characters, are left out."""
MIN_SHARE = 0.2
"""Share of a source file that is in triple quotes, below which it is not parsed: those files hold
a sixth of the docstrings, and parsing them took over half of the time."""
MAX_BYTES = 25_000_000
MAX_SIGNATURE = 400
FILES_PER_TASK = 250
_QUOTED = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)
_SKIP = re.compile(r"(^|/)(tests?|testing|idlelib|lib2to3|_vendor|__pycache__)/|(^|/)test_[^/]*$")


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    # Ray puts copies of packages of its own on the path once it is imported.
    path = [folder for folder in sys.path if "thirdparty_files" not in folder]
    return next(iter(importlib.metadata.distributions(name=name, path=path)), None)


def packages() -> list[tuple[str, str]]:
    """(name, version) of the packages that the project needs to run, sorted; extras left out."""
    versions: dict[str, str] = {}
    todo = ["nanochat_ray"]
    while todo:
        requirement = todo.pop()
        package = _distribution(requirement)
        if package is None:
            continue
        name = package.metadata["Name"].lower().replace("_", "-")
        if name in versions:
            continue
        versions[name] = package.version
        for line in package.requires or []:
            need, _, condition = line.partition(";")
            if "extra" not in condition or requirement == "ray":
                todo.append(re.split(r"[\s\[<>=!~(]", need.strip(), maxsplit=1)[0])
    versions.pop("nanochat-ray", None)
    return sorted(versions.items())


def key() -> str:
    """Equal for equal interpreters and packages."""
    text = repr((sys.version_info[:3], packages(), MIN_DOCSTRING, MIN_SHARE, MAX_BYTES, "2"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files() -> list[Path]:
    """Every Python source of the corpus, in an order that depends on the names only."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    candidates = [(f"stdlib/{p.relative_to(stdlib)}", p) for p in stdlib.rglob("*.py")]
    candidates = [(name, p) for name, p in candidates if "site-packages" not in name]
    for package, _ in packages():
        distribution = _distribution(package)
        assert distribution is not None
        # RECORD as it is: ``distribution.files`` looks at every file, which takes seconds.
        for line in (distribution.read_text("RECORD") or "").splitlines():
            name = line.split(",")[0]
            if name.endswith(".py") and ".." not in name:
                candidates.append((name, Path(str(distribution.locate_file(name)))))
    paths = {name: path for name, path in candidates if not _SKIP.search(name)}
    return [paths[name] for name in sorted(paths)]


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(body: Iterable[ast.stmt]) -> Iterator[tuple[Definition, str]]:
    """Classes and functions of a module with their docstrings, methods after their class."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body)


def _signature(node: Definition, lines: list[str]) -> str:
    """``def name(...) -> ...:`` on one line."""
    header = lines[node.lineno - 1 : max(node.lineno, node.body[0].lineno - 1)]
    text = " ".join(" ".join(line.split()) for line in header)
    text = re.sub(r",? \)", ")", text.replace("( ", "("))
    return text if len(text) <= MAX_SIGNATURE else header[0].strip()


def _c_docstrings(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Documentation of C code that a module passes to a function, as numpy's ``add_newdoc``."""
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.value.args:
            last = node.value.args[-1]
            if isinstance(last, ast.Tuple) and last.elts:
                last = last.elts[-1]
            if isinstance(last, ast.Constant) and isinstance(last.value, str):
                yield inspect.cleandoc(last.value)


def docstrings(path: Path) -> list[str]:
    """The docstrings of a source file worth reading; none if it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    docstring_chars = sum(len(a or b) for a, b in _QUOTED.findall(source))
    if docstring_chars <= MIN_SHARE * len(source):
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = source.splitlines()
    first = ast.get_docstring(tree)
    texts = [first] if first and len(first) >= MIN_DOCSTRING else []
    for node, text in _definitions(tree.body):
        if len(text) >= MIN_DOCSTRING:
            texts.append(f"{_signature(node, lines)}\n{text}")
    texts += [text for text in _c_docstrings(tree.body) if len(text) >= 5 * MIN_DOCSTRING]
    # "\\ud800" in a docstring is half a character.
    return [replace_surrogates(text.rstrip()) for text in texts]


def documents(modules: Iterable[list[str]]) -> list[str]:
    """One document for each module, without the docstrings of earlier modules.

    If that is more than ``MAX_BYTES``, the documents with the lowest hashes remain, in their order,
    so that every package keeps its share.
    """
    hashes: set[bytes] = set()
    candidates: list[tuple[bytes, int, str]] = []
    for module in modules:
        fresh = []
        for text in module:
            signature, _, body = text.partition("\n")
            if not signature.startswith(("def ", "class ", "async ")):
                body = text
            body_hash = hashlib.sha256(body.encode()).digest()
            if body_hash not in hashes:
                hashes.add(body_hash)
                fresh.append(text)
        if fresh:
            document = "\n\n".join(fresh) + "\n"
            data = document.encode()
            candidates.append((hashlib.sha256(data).digest(), len(data), document))
    selection: set[bytes] = set()
    total = 0
    for document_hash, size, _ in sorted(candidates):
        total += size
        if total > MAX_BYTES:
            break
        selection.add(document_hash)
    return [document for document_hash, _, document in candidates if document_hash in selection]


def _extract(item: Any) -> TaskResult:
    """Work of one task: the docstrings of some source files."""
    number, paths = item
    modules = [docstrings(Path(path)) for path in paths]
    return {"number": number, "modules": modules, "documents": len(modules)}


def documentation_corpus(root: Store, map_tasks: MapTasks) -> str:
    """URI of the corpus below ``root``; it is extracted, in parallel, if it is not there yet."""
    store = root.child("corpora", f"documentation-{key()}")
    if store.exists("done"):
        log(f"corpus: {store.uri} (extracted before)")
        return store.uri
    start = time.perf_counter()
    paths = [str(path) for path in files()]
    # Every n-th file: the files of large packages are neighbours, and tasks should take equally
    # long.
    count = -(-len(paths) // FILES_PER_TASK)
    plan = [[number, paths[number::count]] for number in range(count)]
    modules: list[list[str]] = [[] for _ in paths]
    for result in run_with_progress(map_tasks, plan, _extract, "read source files, part"):
        modules[result["number"] :: count] = result["modules"]
    texts = documents(modules)
    size = sum(len(text.encode()) for text in texts)
    # Spread over files, so that units of work mix the packages.
    num_files = max(1, round(size / sources.UNIT_BYTES))
    for number in range(num_files):
        table = pa.table({"text": texts[number::num_files]})
        with (
            store.writing(f"{number:02d}.arrow") as file,
            pa.ipc.new_file(file, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=256)
    store.write_text("done", "")
    log(
        f"corpus: {len(texts):,} documents, {size / 1e6:.1f} MB from {len(paths):,} source "
        f"files in {time.perf_counter() - start:.0f} s; {store.uri}"
    )
    return store.uri
