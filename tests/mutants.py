"""Small mutations of the code, each against the tests that run the function it is in.

    python tests/mutants.py --num 300 --results mutants.jsonl        # resumes where it was

First all tests run once and say which functions each of them calls. A mutant is one flipped
comparison, dropped statement or constant off by one, drawn at random; it is written into this tree,
so run it in a copy of the repository, and is killed if a test fails or takes far too long.
"""

import argparse
import ast
import copy
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
AREAS = ("nanovllm/core", "nanovllm/frontend", "nanovllm/worker/sampling")
TESTS = ("tests/core", "tests/frontend", "tests/worker/sampling", "tests/replay", "tests/watch")
# Loaded once, before forking; nothing of nanovllm, which each child loads with its mutation.
HEAVY = ("torch", "transformers", "hypothesis", "httpx", "starlette", "uvicorn", "openai", "zmq")
MODELS = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "qwen3_moe")  # of tests/conftest.py
HEAVY += tuple(f"transformers.models.{name}.modeling_{name}" for name in MODELS)
HEAVY += ("tokenizers", "llguidance", "msgspec", "numpy", "prometheus_client", "rich")
# Without rewriting of asserts: what it would rewrite is loaded before it could.
QUIET = ("-q", "-p", "no:cacheprovider", "--assert=plain")
MAX_TESTS, MAX_TESTS_S = 200, 60.0  # per mutant
TRACE_LIMIT_S = 600.0  # of a file of tests
LEAST_LIMIT_S, TIMES_LIMIT = 40.0, 6  # a mutant that takes longer hangs
FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OTHER: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


class Site(NamedTuple):
    """A place that can be mutated: which node of the walk, and how it is said to a reader."""

    path: str
    function: str
    node: int
    line: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line}:{self.node}"


# ---- mutations


def kind_of(node: ast.AST) -> str:  # noqa: C901 - a table
    """What would be done to it; "" is nothing."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in FLIPPED:
            return f"{type(op).__name__} → {FLIPPED[type(op)].__name__}"
        case ast.BoolOp(op=ast.And()):
            return "and → or"
        case ast.BoolOp(op=ast.Or()):
            return "or → and"
        case ast.UnaryOp(op=ast.Not()):
            return "not dropped"
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OTHER:
            return f"{type(op).__name__} → {OTHER[type(op)].__name__}"
        case ast.Constant(value=bool(value)):
            return f"{value} → {not value}"
        case ast.Constant(value=int(value)):
            return f"{value} → {value + 1}"
        case ast.Expr(value=ast.Call() | ast.Await()):
            return "call dropped"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return "assignment dropped"
        case ast.Break() | ast.Continue():
            return f"{type(node).__name__.lower()} dropped"
        case ast.IfExp():
            return "branches swapped"
    return ""


def mutated(node: ast.AST) -> ast.AST:
    """A changed copy of what `kind_of` names."""
    new: Any = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[op]):
            new.ops = [FLIPPED[type(op)]()]
        case ast.BoolOp(op=op):
            new.op = ast.Or() if isinstance(op, ast.And) else ast.And()
        case ast.UnaryOp():
            return new.operand
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            new.op = OTHER[type(op)]()
        case ast.Constant(value=value):
            assert isinstance(value, int)
            new.value = not value if isinstance(value, bool) else value + 1
        case ast.IfExp():
            new.body, new.orelse = new.orelse, new.body
        case _:
            return ast.copy_location(ast.Pass(), node)
    return new


def walk(tree: ast.Module) -> Iterator[tuple[int, ast.AST, str]]:
    """(number, node, function) of what runs in functions; texts, types and asserts are left out."""
    count = 0

    def visit(node: ast.AST, scope: tuple[str, ...], within: str) -> Iterator[Any]:
        nonlocal count
        count += 1
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            is_class = isinstance(node, ast.ClassDef)
            scope = (*scope, node.name)
            within = within if is_class else ".".join(scope)
            for child in node.body:
                yield from visit(child, scope if is_class else (*scope, "<locals>"), within)
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield from visit(node.value, scope, within)
            return
        if isinstance(node, ast.Assert | ast.Raise | ast.JoinedStr) or _is_logging(node):
            return
        yield count, node, within
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope, within)

    for statement in tree.body:
        yield from visit(statement, (), "")


def _is_logging(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith(("logger.", "LOG."))


def sites() -> list[Site]:
    """All there are in `AREAS`."""
    found = []
    for area in AREAS:
        for path in sorted((ROOT / area).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for number, node, function in walk(ast.parse(path.read_text())):
                kind = kind_of(node)
                if kind and function:
                    line = getattr(node, "lineno", 0)
                    found.append(Site(name, function, number, line, kind))
    return found


def mutant_of(source: str, site: Site) -> str:
    tree = ast.parse(source)
    (target,) = (node for number, node, _ in walk(tree) if number == site.node)

    class Change(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return mutated(node) if node is target else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Change().visit(tree)))


# ---- which test calls what


class Calls:
    """A pytest plugin: functions of nanovllm that each test calls in this process, and how long it
    takes. Fixtures of a module count for its first test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()
        self._seen: set[Any] = set()

    def _trace(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            self._seen.add(frame.f_code)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self._seen = set()
        began = time.perf_counter()
        threading.setprofile(self._trace)
        sys.setprofile(self._trace)
        try:
            return (yield)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            prefix = f"{ROOT}/nanovllm/"
            called = {
                f"{code.co_filename[len(str(ROOT)) + 1 :]}:{code.co_qualname}"
                for code in list(self._seen)
                if code.co_filename.startswith(prefix)
            }
            self.tests[item.nodeid] = {
                "seconds": time.perf_counter() - began,
                "calls": sorted(called),
            }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:  # or was skipped
            self.failed.add(report.nodeid)


def in_child(work: Callable[[], int], limit_s: float, log: Path) -> int | None:
    """The exit code of `work` in a process of its own; None: it took too long and was killed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 1
        try:
            code = work()
        except BaseException:  # nothing of this process's own may run after it
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + limit_s
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            _end_group(child)
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            _end_group(child)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)


def _end_group(leader: int) -> None:
    """Also what it has started and not ended."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def pytest_in_child(
    arguments: list[str], limit_s: float, log: Path, *plugins: object
) -> int | None:
    return in_child(
        lambda: int(pytest.main([*QUIET, *arguments], [*plugins])),
        limit_s,
        log,
    )


def trace_tests(file: Path, log: Path) -> None:
    """Run all tests, a file of them at a time, and write down what each calls."""
    done: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    paths = [path for tests in TESTS for path in sorted((ROOT / tests).rglob("test_*.py"))]
    for path in paths:
        name = str(path.relative_to(ROOT))
        if name in done:
            continue
        answer = file.with_suffix(".part")
        answer.unlink(missing_ok=True)
        calls = Calls()

        def run(name: str = name, calls: Calls = calls, answer: Path = answer) -> int:
            code = int(pytest.main([*QUIET, name], [calls]))
            good = {i: t for i, t in calls.tests.items() if i not in calls.failed}
            answer.write_text(json.dumps(good))
            return code

        in_child(run, TRACE_LIMIT_S, log)
        done[name] = json.loads(answer.read_text()) if answer.exists() else {}
        file.write_text(json.dumps(done))
        print(f"{name}: {len(done[name])} tests", flush=True)


# ---- the run


def tests_of(site: Site, traced: dict[str, Any]) -> list[tuple[float, str]]:
    """Those that call the function, as many as fit: first those of its own file, and the quickest
    of the others."""
    wanted, own = f"{site.path}:{site.function}", f"/test_{Path(site.path).stem}.py"
    found = sorted(
        (own not in nodeid, test["seconds"], nodeid)
        for tests in traced.values()
        for nodeid, test in tests.items()
        if wanted in test["calls"]
    )
    chosen: list[tuple[float, str]] = []
    for _, seconds, nodeid in found[:MAX_TESTS]:
        if chosen and sum(one for one, _ in chosen) + seconds > MAX_TESTS_S:
            break
        chosen.append((seconds, nodeid))
    # A file that took too long to be traced may be where the function is tested.
    chosen += [(60.0, name) for name, tests in traced.items() if not tests and own in f"{name}::"]
    return chosen


def judge(site: Site, traced: dict[str, Any], log: Path) -> str:
    """ "killed", "survived", "hangs" (killed) or "untested"."""
    chosen = tests_of(site, traced)
    if not chosen:
        return "untested"
    path = ROOT / site.path
    source = path.read_text()
    try:
        path.write_text(mutant_of(source, site))
        limit_s = max(LEAST_LIMIT_S, TIMES_LIMIT * sum(seconds for seconds, _ in chosen))
        code = pytest_in_child(["-x", *(nodeid for _, nodeid in chosen)], limit_s, log)
    finally:
        path.write_text(source)
    return "hangs" if code is None else "survived" if code == 0 else "killed"


def report(results: list[dict[str, Any]]) -> None:
    counts = {verdict: 0 for verdict in ("killed", "hangs", "survived", "untested")}
    for result in results:
        counts[result["verdict"]] += 1
    num_killed = counts["killed"] + counts["hangs"]
    for result in results:
        if result["verdict"] in ("survived", "untested"):
            where = f"{result['path']}:{result['line']}"
            print(f"{result['verdict']}: {where} {result['function']}: {result['kind']}")
    print(
        f"{num_killed} of {len(results)} killed ({num_killed / max(1, len(results)):.1%}): {counts}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "mutants.jsonl")
    parser.add_argument("--report", action="store_true", help="only say what has been found")
    arguments = parser.parse_args()
    results = []
    if arguments.results.exists():
        results = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    if arguments.report:
        return report(results)
    os.nice(15)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    for name in HEAVY:
        __import__(name)
    log = arguments.results.with_suffix(".log")
    traces = arguments.results.with_suffix(".calls.json")
    trace_tests(traces, log)
    traced = json.loads(traces.read_text())
    known = {result["name"] for result in results}
    chosen = random.Random(arguments.seed).sample(sites(), arguments.num)
    for number, site in enumerate(chosen, 1):
        if site.name in known:
            continue
        began = time.monotonic()
        verdict = judge(site, traced, log)
        result = {"name": site.name, **site._asdict(), "verdict": verdict}
        results.append(result)
        with arguments.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{number} {verdict} {site.name} {time.monotonic() - began:.1f} s", flush=True)
    report(results)


if __name__ == "__main__":
    main()
