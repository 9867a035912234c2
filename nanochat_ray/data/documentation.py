"""The default corpus: the documentation that lies on any machine which can run this program.

Docstrings of the standard library and of the packages that the project depends on: English about
code, up to 25 MB. A document is one module: its docstrings in the order of the source, each led by
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
from collections.abc import Iterable, Iterator
from pathlib import Path

MIN_DOCSTRING = 40
"""Characters below which a docstring says too little."""
MIN_SHARE = 0.2
"""Share of a source file that is in triple quotes, below which it is not parsed: those files hold
a sixth of the docstrings, and parsing them took over half of the time."""
MAX_BYTES = 25_000_000
MAX_SIGNATURE = 400
_QUOTED = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)
_SKIP = re.compile(r"(^|/)(tests?|testing|idlelib|lib2to3|_vendor|__pycache__)/|(^|/)test_[^/]*$")


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    # Ray puts copies of packages of its own on the path once it is imported.
    path = [folder for folder in sys.path if "thirdparty_files" not in folder]
    return next(iter(importlib.metadata.distributions(name=name, path=path)), None)


def packages() -> list[tuple[str, str]]:
    """(name, version) of the packages that the project needs to run, sorted; extras left out."""
    found: dict[str, str] = {}
    todo = ["nanochat_ray"]
    while todo:
        wanted = todo.pop()
        package = _distribution(wanted)
        if package is None:
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
    text = repr((sys.version_info[:3], packages(), MIN_DOCSTRING, MIN_SHARE, MAX_BYTES, "2"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files() -> list[Path]:
    """Every Python source of the corpus, in an order that depends on the names alone."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    found = [(f"stdlib/{p.relative_to(stdlib)}", p) for p in stdlib.rglob("*.py")]
    found = [(name, p) for name, p in found if "site-packages" not in name]
    for package, _ in packages():
        distribution = _distribution(package)
        assert distribution is not None
        # RECORD as it is: ``distribution.files`` looks at every file, which takes seconds.
        for line in (distribution.read_text("RECORD") or "").splitlines():
            name = line.split(",")[0]
            if name.endswith(".py") and ".." not in name:
                found.append((name, Path(str(distribution.locate_file(name)))))
    kept = {name: path for name, path in found if not _SKIP.search(name)}
    return [kept[name] for name in sorted(kept)]


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


def _handed_over(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Texts that a module gives to C code as its documentation, as numpy's ``add_newdoc``."""
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
    quoted = sum(len(a or b) for a, b in _QUOTED.findall(source))
    if quoted <= MIN_SHARE * len(source):
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
            found.append(f"{_signature(node, lines)}\n{text}")
    found += [text for text in _handed_over(tree.body) if len(text) >= 5 * MIN_DOCSTRING]
    # A sequence such as "\\ud800" in a docstring is half a character, which no encoder takes.
    return [text.rstrip().encode("utf-8", "replace").decode() for text in found]


def documents(modules: Iterable[list[str]]) -> list[str]:
    """One document for each module, docstrings that stood in an earlier one left out.

    If that is more than ``MAX_BYTES``, those with the lowest hashes are kept, in their order, so
    that every package keeps its share.
    """
    seen: set[bytes] = set()
    made: list[tuple[bytes, int, str]] = []
    for module in modules:
        fresh = []
        for text in module:
            signature, _, body = text.partition("\n")
            if not signature.startswith(("def ", "class ", "async ")):
                body = text
            mark = hashlib.sha256(body.encode()).digest()
            if mark not in seen:
                seen.add(mark)
                fresh.append(text)
        if fresh:
            document = "\n\n".join(fresh) + "\n"
            data = document.encode()
            made.append((hashlib.sha256(data).digest(), len(data), document))
    kept: set[bytes] = set()
    total = 0
    for mark, size, _ in sorted(made):
        total += size
        if total > MAX_BYTES:
            break
        kept.add(mark)
    return [document for mark, _, document in made if mark in kept]
