"""The default corpus: the documentation that lies on any machine which can run this program.

Docstrings of the standard library and of the packages that the project depends on: English about
code, about 20 MB. A document is one module: its docstrings in the order of the source, each led by
the line that defines what it describes. Test files are left out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_DOCSTRING = 40
"""Characters below which a docstring says too little."""
_SKIP = re.compile(r"(^|/)(tests?|testing|idlelib|lib2to3|_vendor|__pycache__)/|(^|/)test_[^/]*$")


def packages() -> list[tuple[str, str]]:
    """(name, version) of the packages that the project needs to run, sorted; extras left out."""
    found: dict[str, str] = {}
    todo = ["nanochat_ray"]
    while todo:
        wanted = todo.pop()
        try:
            package = importlib.metadata.distribution(wanted)
        except importlib.metadata.PackageNotFoundError:
            continue
        name = package.metadata["Name"].lower().replace("_", "-")
        if name in found:
            continue
        found[name] = package.version
        for line in package.requires or []:
            need, _, condition = line.partition(";")
            if "extra" not in condition or wanted == "ray":
                todo.append(re.split(r"[\s\[<>=!~(]", need.strip(), maxsplit=1)[0])
    found.pop("nanochat-ray", None)
    return sorted(found.items())


def key() -> str:
    """Equal for equal interpreters and packages."""
    text = repr((sys.version_info[:3], packages(), MIN_DOCSTRING, "1"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files() -> list[Path]:
    """Every Python source of the corpus, in an order that depends on the names alone."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found = [(f"stdlib/{p.relative_to(stdlib)}", p) for p in stdlib.rglob("*.py")]
    found = [(name, p) for name, p in found if "site-packages" not in name]
    for package, _ in packages():
        for file in importlib.metadata.distribution(package).files or []:
            if file.suffix == ".py" and ".." not in file.parts:
                found.append((str(file), Path(str(file.locate()))))
    kept = {name: path for name, path in found if not _SKIP.search(name)}
    return [kept[name] for name in sorted(kept)]


def _definitions(body: Iterable[ast.stmt]) -> Iterator[tuple[ast.stmt, str]]:
    """Classes and functions of a module with their docstrings, methods after their class."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body)


def docstrings(path: Path) -> list[str]:
    """The docstrings of a source file worth reading; none if it does not parse."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    if '"""' not in source and "'''" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    lines = source.splitlines()
    first = ast.get_docstring(tree)
    found = [first] if first and len(first) >= MIN_DOCSTRING else []
    for node, text in _definitions(tree.body):
        if len(text) >= MIN_DOCSTRING:
            found.append(f"{lines[node.lineno - 1].strip()}\n{text}")
    return [text.rstrip() for text in found]


def documents(modules: Iterable[list[str]]) -> list[str]:
    """One document for each module, docstrings that stood in an earlier one left out."""
    seen: set[bytes] = set()
    made = []
    for module in modules:
        fresh = []
        for text in module:
            body = (
                text.partition("\n")[2] if text.startswith(("def ", "class ", "async ")) else text
            )
            mark = hashlib.sha256(body.encode("utf-8", "replace")).digest()
            if mark not in seen:
                seen.add(mark)
                fresh.append(text)
        if fresh:
            made.append("\n\n".join(fresh).encode("utf-8", "replace").decode() + "\n")
    return made
