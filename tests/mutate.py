"""Mutation testing: small wrong changes to one file, one at a time, that a fast test should fail.

    python -m tests.mutate nanochat_ray/optim/schedule.py --count 20 --seed 1

A mutation changes one node of the syntax tree: a comparison, an operator, a number, the order of
two arguments, a condition, or a statement that is dropped. Each is applied in a temporary copy of
the repository, and the tests that belong to the file run until the first failure. The tests are
those of the mirrored folder, those that import the file first; ``--tests`` names others. Mutations
that no test fails are printed with their line. Those of ``equivalent_mutations.py``, which change
no result, are not tried.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.equivalent_mutations import EQUIVALENT

REPO = Path(__file__).parents[1]
# A forked test process starts with these, which saves seconds for each mutation.
PRELOADED = ("numpy", "pyarrow", "pyarrow.dataset", "torch", "torch.distributed", "pytest",
             "tiktoken", "msgpack", "fastapi", "httpx", "llguidance", "hypothesis")  # fmt: skip

OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any", "clamp_min": "clamp_max",
             "clamp_max": "clamp_min", "bisect_left": "bisect_right", "bisect_right": "bisect_left",
             "append": "appendleft", "masked_fill": "masked_fill_", "cos": "sin", "sin": "cos",
             "floor": "ceil", "ceil": "floor", "popleft": "pop"}  # fmt: skip

SYMMETRIC = ("min", "max", "minimum", "maximum", "equal", "transpose", "compare_digest")
"""Functions whose first two arguments may be exchanged."""


def replacement(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], ast.AST | None]]]:
    """The mutations of a node: what to call them, and what to do to a copy of the node (None:
    changed in place)."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield "comparison", lambda n: n.ops.__setitem__(0, OPERATORS[type(n.ops[0])]())
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield "operator", lambda n: setattr(n, "op", OPERATORS[type(n.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "sign or not", lambda n: n.operand
    if has_dimension(node):
        field, index = ("args", 0) if isinstance(node, ast.Call) else ("value", None)
        yield "dimension", lambda n: set_child(n, field, index, ast.Constant(0))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", lambda n: setattr(n, "value", not n.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield "constant", lambda n: setattr(n, "value", n.value + 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield "constant", lambda n: setattr(n, "value", n.value * 1.5 or 0.5)
    function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    is_symmetric = function.rpartition(".")[2] in SYMMETRIC
    several = isinstance(node, ast.Call) and len({ast.dump(arg) for arg in node.args[:2]}) > 1
    if several and not is_symmetric:
        yield "arguments", lambda n: n.args.insert(0, n.args.pop(1))
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in FUNCTIONS:
            field = "attr" if isinstance(node.func, ast.Attribute) else "id"
            yield "function", lambda n: setattr(n.func, field, FUNCTIONS[name])
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield "condition", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    in_place = isinstance(node, ast.Assign) and not isinstance(
        node.targets[0], (ast.Name, ast.Tuple)
    )
    is_dropped = isinstance(node, (ast.AugAssign, ast.Continue, ast.Break)) or in_place
    is_effect = isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await))
    if is_dropped or (is_effect and counts(node.value)):
        yield "statement", lambda n: ast.Pass()


def has_dimension(node: ast.AST) -> bool:
    """``dim=-1`` or ``x.size(-1)``: as 1 it may be the same dimension, as 0 it is not."""
    if isinstance(node, ast.keyword):
        return node.arg == "dim" and ast.unparse(node.value) == "-1"
    return isinstance(node, ast.Call) and ast.unparse(node).endswith(".size(-1)")


def set_child(node: ast.AST, field: str, index: int | None, child: ast.AST) -> None:
    if index is None:
        setattr(node, field, child)
    else:
        getattr(node, field)[index] = child


def counts(node: ast.AST) -> bool:
    """Whether changes inside a node are wrong values; not texts of errors, types, assertions."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return False
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return False
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assertion
        return False
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return False
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        return name not in ("cast", "TypeVar", "functools.lru_cache") and name.split(".")[
            0
        ] not in ("log", "logger", "logging", "failures", "_LOG")
    return True


def walk(node: ast.AST, path: tuple = ()) -> Iterator[tuple[tuple, ast.AST]]:
    """Every node that counts, with the way to it from the root."""
    yield path, node
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        children = value if isinstance(value, list) else [value]
        for index, child in enumerate(children):
            is_dimension = has_dimension(node) and isinstance(child, ast.UnaryOp)
            if isinstance(child, ast.AST) and counts(child) and not is_dimension:
                step = (field, index) if isinstance(value, list) else (field, None)
                yield from walk(child, (*path, step))


def mutants(source: str) -> list[tuple[int, str, str]]:
    """All mutations of a source text: line, description and the changed text."""
    tree = ast.parse(source)
    changes: list[tuple[int, str, str]] = []
    for path, node in walk(tree):
        for kind, change in replacement(node):
            new_tree = copy.deepcopy(tree)
            parent: ast.AST = new_tree
            for field, index in path[:-1]:
                parent = getattr(parent, field) if index is None else getattr(parent, field)[index]
            field, index = path[-1]
            target = getattr(parent, field) if index is None else getattr(parent, field)[index]
            before = ast.unparse(target).splitlines()[0]
            other = change(target)
            if isinstance(other, ast.AST):
                set_child(parent, field, index, other)
                target = other
            after = ast.unparse(target).splitlines()[0]
            changes.append((node.lineno, f"{kind}: {before}  →  {after}",
                            ast.unparse(ast.fix_missing_locations(new_tree))))  # fmt: skip
    return changes


def tests_of(file: Path, tree: Path) -> list[str]:
    """Tests of the mirrored folder, those that name the file's module first. Of ``on_ray`` these
    are the tests that start no Ray."""
    module = ".".join(file.with_suffix("").parts)
    package, stem = module.rpartition(".")[::2]
    names = (f"{module} import", f"import {module}", f"from {package} import {stem}")
    ranks: list[tuple[int, int, str]] = []
    for test in sorted((tree / "tests").rglob("test_*.py")):
        text, folder = test.read_text(), test.parent.relative_to(tree / "tests")
        direct = any(name in text for name in names)
        is_mirror = folder.parts[:1] == file.parts[1:2]
        own = test.stem == f"test_{file.stem}"
        if (direct or is_mirror) and folder.parts[:1] not in (("browser",), ("k8s",)):
            ranks.append((-2 * own - direct, len(text), str(test.relative_to(tree))))
    return [name for *_, name in sorted(ranks)]


def run_pytest(tree: Path, tests: list[str], log: Path) -> None:
    """Runs ``tests`` in ``tree`` in this process, which ends with pytest's exit status."""
    os.setsid()
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(REPO)))]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "nanochat_ray", "jobs")]:
        del sys.modules[name]
    sys.dont_write_bytecode = True
    import pytest

    code = 1
    try:
        options = ["-x", "-q", "-p", "no:xdist", "-m", "not ray and not browser and not gpu"]
        # Of what was imported before.
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = int(pytest.main([*options, f"--basetemp={tree}/pytest", *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not through the blocks that the parent is in


def run(tree: Path, tests: list[str], limit: float) -> tuple[bool, str]:
    """Whether all ``tests`` pass in ``tree`` within ``limit`` seconds; what pytest printed last."""
    log = tree / "mutation.log"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=run_pytest, args=(tree, tests, log))
    process.start()
    assert process.pid is not None
    process.join(limit)
    is_late = process.is_alive()
    if is_late:
        os.kill(process.pid, signal.SIGINT)  # fixtures end what they started
        process.join(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if is_late:
        return False, "time limit"
    return process.exitcode == 0, "\n".join(log.read_text().splitlines()[-15:])


def copy_tree(to: Path) -> None:
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.check_output(listing, cwd=REPO, text=True).splitlines():
        if (REPO / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / name, to / name)


def is_equivalent(file: Path, line: str, what: str) -> bool:
    entries = EQUIVALENT.get(str(file), {}).get(what, [])
    return any(part in line for part, _ in ([entries] if isinstance(entries, tuple) else entries))


DURATIONS: dict[frozenset[str], float] = {}
"""Seconds that tests take without a mutation, by the set of their files."""


def duration(tests: list[str], tree: Path) -> float:
    """Runs ``tests`` without a mutation, unless they have run before; SystemExit if they fail."""
    key = frozenset(tests)
    if key not in DURATIONS:
        start = time.monotonic()
        ok, output = run(tree, tests, 900)
        if not ok:
            raise SystemExit(f"the tests fail without a mutation\n{output}")
        DURATIONS[key] = time.monotonic() - start
    return DURATIONS[key]


def mutate(file: Path, tests: list[str], count: int, seed: int, tree: Path) -> tuple[int, int]:
    """Tries ``count`` random mutations of ``file`` (0: all); how many were tried, how many
    survived."""
    source = (tree / file).read_text()
    whole = duration(tests, tree)
    lines = source.splitlines()
    changes = [c for c in mutants(source) if not is_equivalent(file, lines[c[0] - 1], c[1])]
    sample = changes if not count else random.Random(seed).sample(changes, min(count, len(changes)))
    survivors = []
    for line, what, text in sorted(sample):
        (tree / file).write_text(text)
        ok, output = run(tree, tests, 10 + 3 * whole)
        if ok:
            survivors.append(what)
            print(f"SURVIVES {file}:{line}  {what}", flush=True)
        elif os.environ.get("MUTATE_VERBOSE"):
            print(f"fails {file}:{line}  {what}  [{output.splitlines()[-2:]}]", flush=True)
    (tree / file).write_text(source)
    share = len(survivors) / max(len(sample), 1)
    print(f"{file}: {len(survivors)} of {len(sample)} survive ({share:.0%}); {len(changes)} "
          f"mutations in all, tests take {whole:.1f} s", flush=True)  # fmt: skip
    return len(sample), len(survivors)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="relative to the repository")
    parser.add_argument("--count", type=int, default=20, help="mutations of each file; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", default=[], help="instead of those of the folder")
    args = parser.parse_args()
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    totals = [0, 0]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        for file in args.files:
            tests = args.tests or tests_of(file, tree)
            result = mutate(file, tests, args.count, args.seed, tree)
            totals = [a + b for a, b in zip(totals, result, strict=True)]
    print(f"in all {totals[1]} of {totals[0]} survive ({totals[1] / max(totals[0], 1):.1%})")


if __name__ == "__main__":
    main()
