"""Small mutations of the code, each against the tests that run the line it is in.

    python tests/mutants.py --num 300 --processes 2        # goes on where it was

First all tests run once and say which lines each of them runs; later runs trace only files of
tests that have changed. A mutant is one flipped comparison, dropped statement or constant off by
one, drawn at random. The tests are collected once; a fork of that process puts the mutant's code
into its functions and runs them. Programs that they start read the mutant from the tree, so each
of `--processes` has a copy of it. Time is CPU time.
"""

import argparse
import ast
import copy
import difflib
import fcntl
import gc
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
AREAS = ("nanovllm/core", "nanovllm/frontend", "nanovllm/worker/sampling")
TESTS = ("tests/core", "tests/frontend", "tests/worker/sampling", "tests/replay", "tests/watch")
# Without rewriting of asserts: what it would rewrite is loaded before it could.
QUIET = ("-q", "-p", "no:cacheprovider", "--assert=plain")
MAX_TESTS, MAX_TESTS_S = 200, 30.0  # per mutant; seconds of CPU time
UNKNOWN_S = 0.5  # of a test that could not be traced
QUICK_S = 0.3  # tests that take no longer run before all others
IN_BROWSERS = ("test_foreign_page.py", "test_lesson.py", "test_page.py", "test_screenshots.py")
# Whose tests are in files of other names: by what it is about, and of what runs in processes of its
# own those that start it.
TESTS_OF = {
    "app.py": ("test_api_errors.py",),
    "bodies.py": ("test_request_fields.py",),
    "body_trial.py": ("test_body_trial.py",),
    "command.py": ("test_command.py", "test_serve.py"),
    "connections.py": ("test_connections.py", "test_connection_bounds.py"),
    "decoding.py": ("test_api_errors.py", "test_limits.py"),
    "encoding_process.py": ("test_prompts.py",),
    "endpoint.py": ("test_api_errors.py", "test_responses.py"),
    "frontends.py": ("test_frontends.py", "test_serve.py"),
    "grammar.py": ("test_grammar.py", "test_matchers.py"),
    "grammar_source.py": ("test_grammar.py",),
    "grammar_trial.py": ("test_grammar_sandbox.py",),
    "json_shape.py": ("test_json_place.py",),
    "logprobs.py": ("test_completions.py", "test_sampler.py"),
    "middleware.py": ("test_limits.py", "test_origins.py", "test_api_errors.py"),
    "reasoning.py": ("test_tool_parsers.py",),
    "reply_format.py": ("test_tool_parsers.py",),
    "run.py": ("test_serve.py",),
    "sampling.py": ("test_request_fields.py",),
    "sequence.py": ("test_scheduler.py",),
    "serving.py": ("test_api_errors.py", "test_info.py", "test_metrics.py"),
    "session.py": ("test_resume.py", "test_trials.py"),
    "template_process.py": ("test_chat_template.py",),
    "waiting.py": ("test_admission.py",),
}
TRACE_LIMIT_S = 300.0  # of CPU time, for a file of tests
TRACED_CALLS = 100  # of a function in each test: following every line of loops takes too long
# A mutant hangs if a test takes so many times longer than it took, or waits for so long.
LEAST_LIMIT_S, TIMES_LIMIT, WAITING_LIMIT_S = 5.0, 5.0, 10.0
LOOK_EVERY_S = 0.1
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
    last_line: int
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
    """(number, node, function) of what runs in functions; texts, types and what only asserts (also
    `strict` of a `zip`) are left out."""
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
        if isinstance(node, ast.keyword) and node.arg == "strict":
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
                    first, last = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
                    found.append(Site(name, function, number, first, last, kind))
    return found


def mutant_of(source: str, site: Site) -> str:
    tree = ast.parse(source)
    (target,) = (node for number, node, _ in walk(tree) if number == site.node)

    class Change(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return mutated(node) if node is target else self.generic_visit(node)

    return ast.unparse(ast.fix_missing_locations(Change().visit(tree)))


# ---- which test runs what


class Lines:
    """A pytest plugin: lines of `AREAS` that each test runs in this process, and its CPU time. What
    is set up for a whole file counts for its first test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()
        self._seen: dict[CodeType, set[int]] = {}
        self._num_calls: dict[CodeType, int] = {}
        self._areas = tuple(f"{ROOT}/{area}/" for area in AREAS)
        self._began = 0.0
        self._set_up_s = 0.0

    def _on_call(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self._areas):
            return None
        self._num_calls[code] = num_calls = self._num_calls.get(code, 0) + 1
        if num_calls > TRACED_CALLS:
            return None
        seen = self._seen.setdefault(code, set())

        def on_line(frame: FrameType, event: str, argument: object) -> Any:
            seen.add(frame.f_lineno)
            return on_line

        return on_line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self._seen, self._num_calls = {}, {}
        self._began = cpu_s()
        threading.settrace(self._on_call)
        sys.settrace(self._on_call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            lines: dict[str, set[int]] = {}
            for code, seen in list(self._seen.items()):
                lines.setdefault(code.co_filename[len(str(ROOT)) + 1 :], set()).update(seen)
            self.tests[item.nodeid] = {
                "seconds": cpu_s() - self._began,
                "set_up_s": self._set_up_s,
                "lines": {path: sorted(numbers) for path, numbers in lines.items()},
            }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup":
            self._set_up_s = cpu_s() - self._began
        if not report.passed:  # or was skipped
            self.failed.add(report.nodeid)


def cpu_s() -> float:
    """Of this process and those that it has started and waited for."""
    return sum(os.times()[:4])


def in_child(
    work: Callable[[], int],
    limit_s: float,
    log: Path,
    *,
    waiting_limit_s: float = math.inf,
    progress: Path | None = None,
) -> int | None:
    """The exit code of `work` in a process of its own; None: it took too much CPU time or was seen
    waiting for too long since it last wrote to `progress`, and was killed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        limit_cpu(limit_s)
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
    waited_s, written = 0.0, b""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            _end_group(child)
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        if waited_s > waiting_limit_s:
            _end_group(child)
            os.waitpid(child, 0)
            return None
        time.sleep(LOOK_EVERY_S)
        if progress is not None and progress.read_bytes() != written:
            waited_s, written = 0.0, progress.read_bytes()
        waited_s += 0.0 if _wants_to_run(child) else LOOK_EVERY_S


def limit_cpu(seconds: float) -> None:
    """Of this process, from now on."""
    limit = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _wants_to_run(process: int) -> bool:
    """Whether a thread of it, or of what it has started, runs or would if there were a processor
    for it. A machine that is busy with other things makes nothing wait in this sense."""
    try:
        for task in Path(f"/proc/{process}/task").iterdir():
            if (task / "stat").read_text().rpartition(")")[2].split()[0] in "RD":
                return True
            for started in (task / "children").read_text().split():
                if _wants_to_run(int(started)):
                    return True
    except (FileNotFoundError, ProcessLookupError):
        return True  # it has ended just now
    return False


def _end_group(leader: int) -> None:
    """Also what it has started and not ended."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_files() -> list[Path]:
    """But for those of the page, which run nothing of `AREAS` in this process."""
    found = [path for tests in TESTS for path in sorted((ROOT / tests).rglob("test_*.py"))]
    return [path for path in found if path.name not in IN_BROWSERS]


def load_libraries(log: Path) -> None:
    """Load once, before forking, what the tests import; nothing of this repository, which each
    child loads with its mutation."""
    answer = log.with_suffix(".libraries")

    def list_them() -> int:
        for path in test_files():
            try:
                importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
            except pytest.skip.Exception:
                continue  # the whole file, for want of a package
        names = [
            name
            for name, module in sys.modules.items()
            if not (getattr(module, "__file__", None) or "").startswith(f"{ROOT}/")
        ]
        answer.write_text("\n".join(names))
        return 0

    if in_child(list_them, TRACE_LIMIT_S, log) != 0:
        raise SystemExit(f"the tests cannot be imported: see {log}")
    for name in answer.read_text().splitlines():
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:
                continue  # made, not imported, by the module that it belongs to
    answer.unlink()
    assert "nanovllm" not in sys.modules, "its mutations would not be seen"


def trace_tests(directory: Path, log: Path) -> dict[str, Any]:
    """Run all tests, a file of them at a time, and write down what each runs, unless that is known;
    what other processes with this directory trace now is theirs. Returns that of all files."""
    directory.mkdir(exist_ok=True)
    done: dict[str, Any] = {}
    found = Traced(directory / "sources")
    for lock in (fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX):  # then wait for the others'
        for path in test_files():
            name = str(path.relative_to(ROOT))
            with (directory / name.replace("/", ".")).with_suffix(".json").open("a+") as file:
                try:
                    fcntl.flock(file, lock)
                except BlockingIOError:
                    continue
                file.seek(0)
                known = json.loads(file.read() or "{}")
                if known.get("source") != found.keep(path):
                    tests = traced_file(name, log)
                    known = {"source": found.keep(path), "of": found.sources, "tests": tests}
                    file.truncate(0)
                    file.write(json.dumps(known))
                done[name] = found.now(known["of"], known["tests"])
    return done


class Traced:
    """Keeps the text of what has been traced, since lines move when it is edited.

    sources: path of each file of `AREAS` → name of its text as it is.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self._directory = directory
        paths = [path for area in AREAS for path in sorted((ROOT / area).rglob("*.py"))]
        self.sources = {str(path.relative_to(ROOT)): self.keep(path) for path in paths}
        self._moves: dict[tuple[str, str], dict[int, int]] = {}

    def keep(self, path: Path) -> str:
        """The name of its text."""
        text = path.read_text()
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (self._directory / name).exists():
            (self._directory / name).write_text(text)
        return name

    def now(self, sources: dict[str, str], tests: dict[str, Any]) -> dict[str, Any]:
        """tests: what they ran when the texts were `sources`. Returns where these lines are now;
        those that have changed are in none."""
        return {
            id: {
                **test,
                "lines": {
                    path: [
                        self._move(path, sources[path])[line]
                        for line in lines
                        if line in self._move(path, sources[path])
                    ]
                    for path, lines in test["lines"].items()
                    if path in self.sources
                },
            }
            for id, test in tests.items()
        }

    def _move(self, path: str, source: str) -> dict[int, int]:
        """Of a text's lines: number → number now."""
        if (path, source) not in self._moves:
            before, now = (
                (self._directory / name).read_text().splitlines()
                for name in (source, self.sources[path])
            )
            blocks = difflib.SequenceMatcher(None, before, now, autojunk=False)
            self._moves[path, source] = {
                block.a + index + 1: block.b + index + 1
                for block in blocks.get_matching_blocks()
                for index in range(block.size)
            }
        return self._moves[path, source]


def traced_file(name: str, log: Path) -> dict[str, Any]:
    """What each test of a file runs; nothing of those that fail without a mutant."""
    answer = log.with_suffix(".part")
    answer.unlink(missing_ok=True)
    lines = Lines()

    def run() -> int:
        code = int(pytest.main([*QUIET, name], [lines]))
        good = {i: t for i, t in lines.tests.items() if i not in lines.failed}
        answer.write_text(json.dumps(good))
        return code

    in_child(run, TRACE_LIMIT_S, log, waiting_limit_s=TRACE_LIMIT_S)
    tests: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
    seconds = sum(test["seconds"] for test in tests.values())
    print(f"{name}: {len(tests)} tests, {seconds:.1f} s", flush=True)
    return tests


# ---- the run


class Chosen(NamedTuple):
    """A test for a mutant. rank: in which round it runs, among those of its file."""

    rank: int
    seconds: float
    id: str

    @property
    def file(self) -> str:
        return self.id.split("::")[0]


def tests_of(site: Site, traced: dict[str, Any], items: dict[str, pytest.Item]) -> list[Chosen]:
    """Those that run the line, as many as fit into the time, in the order in which they run: quick
    ones first, those of the tests' file for it before others. At the end the others of that file:
    they may start programs that run the line."""
    set_up = {
        file: next(iter(tests.values()))["set_up_s"] for file, tests in traced.items() if tests
    }
    chosen: list[Chosen] = []
    left_s = MAX_TESTS_S
    for one in sorted(_candidates(site, traced, items)):
        cost = one.seconds + set_up.get(one.file, 0.0)
        if len(chosen) < MAX_TESTS and (cost <= left_s or not chosen):
            chosen.append(one._replace(seconds=cost))
            left_s -= cost
            set_up[one.file] = 0.0
    # By file, so that what is set up for all of a file is set up once in each round.
    files = list(dict.fromkeys(one.file for one in chosen))
    return sorted(chosen, key=lambda one: (one.rank, files.index(one.file)))


def _candidates(
    site: Site, traced: dict[str, Any], items: dict[str, pytest.Item]
) -> Iterator[Chosen]:
    name = Path(site.path).name
    own = tuple(f"/{one}" for one in TESTS_OF.get(name, (f"test_{name}",)))
    wanted = set(range(site.line, site.last_line + 1))
    for file, tests in traced.items():
        is_own = file.endswith(own)
        for index, (id, test) in enumerate(tests.items()):
            # What was set up for all of the file is paid by whichever runs first.
            seconds = test["seconds"] - (0.0 if index else test["set_up_s"])
            runs = not wanted.isdisjoint(test["lines"].get(site.path, ()))
            if id in items and (runs or is_own):
                rank = 2 * (seconds > QUICK_S) + (not is_own) if runs else 4
                yield Chosen(rank, seconds, id)
    for id in items:  # of a file that took too long to trace
        file = id.split("::")[0]
        if file.endswith(own) and not traced.get(file):
            yield Chosen(2, UNKNOWN_S, id)


def outer_codes(source: str, site: Site) -> list[CodeType]:
    """What the function around a site compiles to; several are of one name (a property's two)."""
    wanted, found = site.function.split(".<locals>")[0], list[CodeType]()

    def visit(code: CodeType) -> None:
        for one in code.co_consts:
            if isinstance(one, CodeType):
                found.extend([one] if one.co_qualname == wanted else [])
                visit(one)

    visit(compile(source, str(ROOT / site.path), "exec"))
    return sorted(found, key=lambda one: one.co_firstlineno)


class Judging:
    """A pytest plugin: in place of running what was collected, tries each site's mutant on it."""

    def __init__(
        self, chosen: list[Site], traced: dict[str, Any], log: Path, tell: Callable[..., None]
    ) -> None:
        """tell: called with each site, its verdict, the seconds it took and what test failed."""
        self._chosen = chosen
        self._traced = traced
        self._log = log
        self._tell = tell
        self._functions: dict[tuple[str, str], list[FunctionType]] = {}
        self._failed = False  # in a child

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed = self._failed or report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        gc.unfreeze()  # what is frozen is not found
        for one in gc.get_objects():
            if type(one) is FunctionType and one.__code__.co_filename.startswith(f"{ROOT}/"):
                key = one.__code__.co_filename, one.__code__.co_qualname
                self._functions.setdefault(key, []).append(one)
        gc.collect()
        gc.freeze()
        items = {item.nodeid: item for item in session.items}
        for site in self._chosen:
            began = time.monotonic()
            verdict, by = self._judge(site, session, items)
            self._tell(site, verdict, time.monotonic() - began, by)
        return True

    def _judge(
        self, site: Site, session: pytest.Session, items: dict[str, pytest.Item]
    ) -> tuple[str, str]:
        """ "killed", "survived", "hangs" (killed) or "untested"; and the test that killed it. What
        happens without the mutant as well, as on a busy machine, says nothing."""
        chosen = tests_of(site, self._traced, items)
        while chosen:
            verdict, by = self._run(site, session, items, chosen)
            if verdict == "survived":
                return verdict, ""
            again = [one for one in chosen if one.id == by]
            if self._run(None, session, items, again)[0] == "survived":
                return verdict, by
            chosen = [one for one in chosen if one.id != by]
        return "untested", ""

    def _run(
        self,
        site: Site | None,
        session: pytest.Session,
        items: dict[str, pytest.Item],
        chosen: list[Chosen],
    ) -> tuple[str, str]:
        """A verdict on a mutant, or on the code as it is; and the test that ran last."""
        path = ROOT / site.path if site else Path(__file__)
        source = path.read_text()
        mutant = mutant_of(source, site) if site else source
        tests = [items[one.id] for one in chosen]
        running = self._log.with_suffix(".running")
        running.write_text(tests[0].nodeid)

        def work() -> int:
            if site:
                self._change(site, source, mutant)
            for one, test, following in zip(chosen, tests, [*tests[1:], None], strict=True):
                running.write_text(test.nodeid)
                limit_cpu(max(LEAST_LIMIT_S, TIMES_LIMIT * one.seconds))
                session.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
                if self._failed:
                    session._setupstate.teardown_exact(None)
                    return 1
            return 0

        try:
            path.write_text(mutant)
            code = in_child(
                work, LEAST_LIMIT_S, self._log, waiting_limit_s=WAITING_LIMIT_S, progress=running
            )
        finally:
            path.write_text(source)
        verdict = "hangs" if code is None else "survived" if code == 0 else "killed"
        return verdict, running.read_text()

    def _change(self, site: Site, source: str, mutant: str) -> None:
        """In this process. What is imported later is read from the tree."""
        before, after = outer_codes(source, site), outer_codes(mutant, site)
        lines = [code.co_firstlineno for code in before]
        for function in self._functions.get((str(ROOT / site.path), before[0].co_qualname), ()):
            function.__code__ = after[lines.index(function.__code__.co_firstlineno)]


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


def judge_share(arguments: argparse.Namespace) -> None:
    """In a process of its own, and a tree."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    share, num_shares = map(int, arguments.share.split("/"))
    log = arguments.results.with_suffix(f".{share}.log")
    importlib.import_module("tests")  # sets what libraries read when they are imported
    load_libraries(log)
    traced = trace_tests(arguments.results.with_suffix(".lines"), log)
    known = {result["name"] for result in results_of(arguments.results)}
    found = [site for site in sites() if arguments.only in site.name]
    chosen = random.Random(arguments.seed).sample(found, min(arguments.num, len(found)))

    def tell(site: Site, verdict: str, seconds: float, by: str) -> None:
        result = {"name": site.name, **site._asdict(), "verdict": verdict, "by": by}
        with arguments.results.open("a") as file:  # a line is written at once
            file.write(json.dumps(result) + "\n")
        print(f"{verdict} {site.name} {seconds:.1f} s", flush=True)

    left = [site for site in chosen[share::num_shares] if site.name not in known]
    judging = Judging(left, traced, log, tell)
    files = [str(path.relative_to(ROOT)) for path in test_files()]
    pytest.main([*QUIET, "-s", "-p", "no:terminalreporter", *files], [judging])


def judge_all(arguments: argparse.Namespace) -> None:
    """Give each process a copy of the tree and its share, and wait for them."""
    hidden = shutil.ignore_patterns(".*", "build", "__pycache__")
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        running = []
        for share in range(arguments.processes):
            tree = Path(directory) / str(share)
            shutil.copytree(ROOT, tree, ignore=hidden)
            program = [sys.executable, str(tree / "tests" / "mutants.py")]
            program += [f"--{name}={getattr(arguments, name)}" for name in ("num", "seed", "only")]
            program += [f"--share={share}/{arguments.processes}", f"--results={arguments.results}"]
            running.append(subprocess.Popen(program))
        failed = [process.args for process in running if process.wait() != 0]
    if failed:
        raise SystemExit(f"{failed[0]} failed: see above")


def results_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--only", default="", help="of PATH:LINE names that contain it")
    parser.add_argument("--processes", type=int, default=1, help="side by side, of some 2 GiB each")
    parser.add_argument("--report", action="store_true", help="only say what has been found")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)  # I/N, of such a process
    arguments = parser.parse_args()
    if arguments.share:
        return judge_share(arguments)
    arguments.results = arguments.results.resolve()
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        judge_all(arguments)
    report(results_of(arguments.results))


if __name__ == "__main__":
    main()
