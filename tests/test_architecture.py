"""The rules of the layout, as tests: who may import whom, how long things are, what is banned."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nanovllm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL_PYTHON = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]

MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 7
MAX_DOCSTRING_LINES = 6

# Lines of Python per room. They are raised only in a commit that says why.
BUDGETS = {
    # 3,000, the grammars of its requests and the process that tries them first, the order in which
    # requests are taken in, trials of those that may have killed a core, who is at fault when a
    # request fails, what a client's key allows, masks beside the loop, and forced tokens; how long
    # slow steps may take before they are a stall; the pace of a core that is looked at step by
    # step; what a core leaves about its end; block tables per group of layers, and what windows
    # let go of; forced tokens that are found before their masks; sequences that steps
    # of a pipeline share; where an output is in its JSON schema, so that masks can be kept by it,
    # and which schemas need no trial; the same of regular expressions
    # what waits when a core fails is for the next one; what a step of many tokens may take before
    # it is a stall; choices, and references in plain schemas; masks of outputs that have not begun
    # the states of a grammar, by which most tokens of its outputs are taken in; which masks workers
    # have; where tokens lead out of a container, and that those of the same classes lead alike
    "core": 6720,
    # 3,000, chat templates in processes of their own, suspects, misuse, several cores; whether a
    # core failed by itself, and what follows for its requests; what Ray is told of replicas;
    # silence of a core beside that of this process
    "frontend": 4030,
    # and the fields that clients send; connections, origins, bodies, keys; a core of several
    # frontends that is started again, prompts whose encoding can be ended; what is set for a lesson
    "frontend.server": 6140,
    # 5,000, and shares of ranks, pieces of tensors, mixtures of experts, a step's second half, and
    # the native decoder of CPUs; ranks that meet, and the vocabulary and norms that they share;
    # ropes and norms of more families, and what is captured before the core is ready; block tables
    # per group of layers, experts beside MLPs and inputs of layers, scales of an FP8 cache; which
    # way sums over ranks take, as measured, and sampling by ranks that keep their logits; which
    # experts a rank has whole; stages of a pipeline, their layers and weights, and what passes
    # between them; graphs of what masks ask for; ranks of several hosts; what few steps ask for, in
    # functions that the others do not pass
    # the ids that ranks compare, stages too
    # whatever rows ask of a step by one graph, and what steps under way have on the host
    # rows that read what others of their step write, and where the entries of a step end
    "worker": 7860,
    "worker.quant": 1500,  # formats of quantized weights, some 100 lines each
}
# Rooms inside of rooms; what they hold counts and is tied there, not in the room around them.
INNER_ROOMS = ("frontend.server", "worker.kernels", "worker.attention.triton", "worker.quant")

# What everyone may import.
SHARED = {
    *("checkpoint", "config", "keys", "keywords", "limits", "places", "protocol"),
    "sampling_params",
}

# room → what it may import besides itself and SHARED
ARROWS = {
    "": {"frontend"},  # nanovllm/__init__.py: the public names, and the version
    "__main__": {"cli"},
    "bench": {"frontend"},
    "chat": {"frontend", "terminal"},
    "checkpoint": set(),
    "cli": {"", "bench", "chat", "flags", "frontend", "operator_commands", "plan", "terminal"},
    "config": set(),
    "core": {"executor.base"},
    "executor": {"worker"},
    "flags": set(),
    "frontend": set(),
    "frontend.server": {"", "flags", "frontend", "watch"},
    "keys": set(),
    "keywords": set(),
    "launch": {
        *("core", "executor", "flags", "frontend.tokenizer", "replay.recorder", "watch.observer"),
    },
    "limits": set(),
    "places": set(),
    "operator_commands": {"replay", "watch.top"},
    "plan": set(),
    "protocol": set(),
    "replay": {"core", "executor.base"},
    "sampling_params": set(),
    "terminal": {"frontend.outputs"},
    "watch": {"core", "frontend"},
    "worker": {"plan.memory_plan", "plan.precision"},
}


def module_name(path: Path) -> str:
    """'core.scheduler' for nanovllm/core/scheduler.py; '' for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports anywhere in it, without the leading name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if (node.module or "").split(".")[0] == "nanovllm":
                yield (node.module or "").removeprefix("nanovllm").lstrip(".")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "nanovllm":
                    yield alias.name.removeprefix("nanovllm").lstrip(".")


def room_of(module: str) -> str:
    """The room a module is in: its folder, or itself if it lies at the top."""
    inner = [room for room in INNER_ROOMS if f"{module}.".startswith(f"{room}.")]
    return inner[0] if inner else module.split(".")[0]


def test_rooms_form_no_circle() -> None:
    ties: dict[str, set[str]] = {}
    for path in SOURCES:
        room = room_of(module_name(path))
        ties.setdefault(room, set()).update(room_of(target) for target in imported_modules(path))
    for room in INNER_ROOMS[1:]:  # of the worker: what they import of each other is its own affair
        ties["worker"] |= ties.pop(room)
    graph = {
        room: {"worker" if target.startswith("worker") else target for target in targets} - {room}
        for room, targets in ties.items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"rooms import each other in a circle: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("room", BUDGETS)
def test_rooms_keep_to_their_budget(room: str) -> None:
    lines = {
        path: path.read_text().count("\n")
        for path in SOURCES
        if room_of(module_name(path)) == room and module_name(path)
    }
    assert sum(lines.values()) <= BUDGETS[room], f"{room} holds {sum(lines.values())} lines"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    home = room_of(module_name(path))
    home = "worker" if home.startswith("worker.") else home
    assert home in ARROWS, f"{home} has no place in the import rules"
    allowed = ARROWS[home] | SHARED | {home}
    for target in imported_modules(path):
        prefixes = {".".join(target.split(".")[:n]) for n in (1, 2)}
        assert prefixes & allowed, f"{home} must not import {target}"


@pytest.mark.parametrize(
    "module",
    [
        "nanovllm",
        "nanovllm.cli",
        "nanovllm.plan.command",
        "nanovllm.launch",
        "nanovllm.core.scheduler",
        "nanovllm.core.server",
        "nanovllm.frontend.async_llm",
        "nanovllm.frontend.llm",
        "nanovllm.frontend.server.run",
        "nanovllm.executor.base",
        "nanovllm.executor.group",
        "nanovllm.executor.inline",
        "nanovllm.executor.synthetic",
        "nanovllm.bench.clients",
    ],
)
def test_importing_loads_no_torch(module: str) -> None:
    program = f"import {module}, sys; print(sorted(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for heavy in ("'torch'", "'transformers'", "'triton'", "'ray'"):
        assert heavy not in out, f"{module} must not load {heavy}"


def test_ray_is_imported_by_its_launcher_alone() -> None:
    """Who does not ask for it needs no Ray, and waits for none."""
    importers = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if any(name.split(".")[0] == "ray" for name in names):
                importers.add(module_name(path))
    assert importers == {"executor.ray_launcher"}


def test_a_worker_on_a_cpu_loads_only_torch() -> None:
    program = "import nanovllm.worker.worker, sys; print(sorted(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    for heavy in ("'transformers'", "'triton'", "'tokenizers'", "'rich'", "'gguf'", "'sympy'"):
        assert heavy not in out, f"a core process must not load {heavy}: starting waits for it"


def test_importing_the_package_loads_nothing_of_it() -> None:
    program = "import nanovllm, sys; print([m for m in sys.modules if m.startswith('nanovllm.')])"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # A kernel's length and parameters are its launch interface and its maths.
            if _is_kernel(node):
                continue
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"
            arguments = node.args
            count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
            is_method = arguments.args[:1] and arguments.args[0].arg in ("self", "cls")
            assert count - bool(is_method) <= MAX_PARAMETERS, f"{node.name}: {count}"


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """In Triton, or in Gluon, its layer below."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any("triton.jit" in text or "gluon.jit" in text for text in decorators)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_modules_say_what_they_own(path: Path) -> None:
    source = path.read_text()
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert source == "", "subpackages have empty __init__.py files"
        return
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, "a module docstring says what the module owns and who calls it"
    assert docstring.count("\n") < MAX_DOCSTRING_LINES


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_banned_things_are_absent(path: Path) -> None:
    assert path.name not in ("utils.py", "helpers.py", "common.py")
    source = path.read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), "no global state"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & {"pickle", "cloudpickle", "dill"}, "nothing is ever pickled"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = node.func.id
            assert called not in ("eval", "exec", "compile", "__import__"), "nothing is evaluated"
        if isinstance(node, ast.ExceptHandler):
            swallowed = node.type is None and not any(
                isinstance(inner, ast.Raise) for inner in ast.walk(node)
            )
            assert not swallowed, "a bare except must raise"
    assert not re.search(r"/(root|home|work|tmp/m)/", source), "no machine paths"


def test_a_sequence_s_field_is_written_by_its_owner_alone() -> None:
    """Of `core.sequence.Sequence`, which says the same; what is not here is the scheduler's. A
    recording that is run again sets everything anew (`replay.snapshot`)."""
    owners = {
        **dict.fromkeys(("client_id", "number", "params", "seed", "num_first_known"), "sequence"),
        **dict.fromkeys(("bad_words_token_ids", "cache_salt", "num_prompt_tokens"), "sequence"),
        **dict.fromkeys(("block_ids", "block_keys", "capacity"), "block_manager"),
        "next_registration": "block_manager",
        "matcher": "compilations",
        **dict.fromkeys(("wait_mark", "waited_s"), "waiting"),
    }
    names = {"sequence", "victim", "leader", "urgent", "one", "fork"}
    for path in (PACKAGE / "core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AugAssign | ast.AnnAssign):
                targets = [node.target]
            for target in (one for each in targets for one in ast.walk(each)):
                if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                    owner = owners.get(target.attr, "scheduler")
                    is_sequence = isinstance(target.value, ast.Name) and target.value.id in names
                    assert not is_sequence or path.stem == owner, f"{path}: {ast.unparse(target)}"


def test_nothing_is_called_by_a_name_from_the_wire() -> None:
    """Where frames are read, attributes are looked up by names that stand in the source: a message
    is matched by its type, and there is no other way from it to code."""
    core = ("server", "socket", "clients", "engine_core")
    frontend = ("link", "core_life", "supervisor", "session", "request")
    paths = [PACKAGE / "core" / f"{name}.py" for name in core]
    paths += [PACKAGE / "frontend" / f"{name}.py" for name in frontend]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("setattr", "vars", "globals", "import_module")
                if node.func.id == "getattr" and not isinstance(node.args[1], ast.Constant):
                    # Of data (`worker` of two Welcomes), by the name of a loop over constants.
                    assert path.stem == "supervisor" and ast.unparse(node.args[1]) == "name"


def test_public_names_are_sorted_and_real() -> None:
    import nanovllm

    assert sorted(nanovllm.__all__) == sorted(set(nanovllm.__all__))
    assert set(nanovllm.__all__) == set(nanovllm._HOMES)
    for name in nanovllm.__all__:
        assert getattr(nanovllm, name).__name__ == name
