"""`nanovllm top`: the engine's page in a terminal, of a server or of a core.

Registered by `operator_commands`. Events come over HTTP, as the page gets them, or from a watcher
of the core's own; what they mean is in `state.py`, how it looks in `screen.py`.
"""

import argparse
import asyncio
import contextlib
import os
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator
from http.client import HTTPException

import msgspec

from nanovllm.watch.events import EngineEvent
from nanovllm.watch.top.view import View

Run = Callable[[argparse.Namespace], int]
Events = AsyncGenerator[EngineEvent | None, None]
DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "NANOVLLM_API_KEY"
SILENCE_S = 15.0  # a server says at least once a second that nothing is new


def add_top_command(add: Callable[[str, Run, str], argparse.ArgumentParser]) -> None:
    """add: makes a command of a name, a function and a line of help."""
    top = add("top", run_top, "watch an engine at work, in a terminal; q ends it")
    source = top.add_mutually_exclusive_group()
    source.add_argument("--url", default=DEFAULT_URL, help="of a server (default: %(default)s)")
    source.add_argument("--address", help="of a core: ipc://PATH or tcp://HOST:PORT")
    top.add_argument("--keys", metavar="FILE", help="this client's keys, with --address")
    top.add_argument("--api-key", help=f"with --url; else ${KEY_VARIABLE}, if it is set")
    top.add_argument("--once", action="store_true", help="print what there is now, and end")


def run_top(arguments: argparse.Namespace) -> int:
    import uvloop

    return uvloop.run(watch(arguments))


async def watch(arguments: argparse.Namespace) -> int:
    """Until the engine ends or the user does. `ValueError`, `EngineDeadError`: it cannot be had."""
    from rich.console import Console
    from rich.live import Live

    from nanovllm.watch.top.screen import Screen
    from nanovllm.watch.top.state import State

    key = arguments.api_key or os.environ.get(KEY_VARIABLE)
    events = from_core(arguments) if arguments.address else from_server(arguments.url, key)
    console, state = Console(), State()
    async with contextlib.aclosing(events):
        if arguments.once:
            first = await anext(events)
            assert first is not None
            state.apply(first)
            console.print(Screen(state))
            return 0
        view = View() if sys.stdin.isatty() else None
        with Live(console=console, screen=True, auto_refresh=False) as live:

            def show() -> None:
                live.update(Screen(state, view), refresh=True)

            async def follow() -> None:
                async for event in events:
                    if event is not None:
                        state.apply(event)
                    show()

            show()  # before the engine has said anything
            following = asyncio.create_task(follow())
            try:
                with (
                    contextlib.nullcontext()
                    if view is None
                    else reading_keys(view, on_key=show, on_quit=following.cancel)
                ):
                    await following
            except asyncio.CancelledError:
                if not following.cancelled():
                    raise
    return 0


@contextlib.contextmanager
def reading_keys(
    view: View, *, on_key: Callable[[], None], on_quit: Callable[[], object]
) -> Iterator[None]:
    """While inside, what is pressed on the terminal changes the view."""
    from prompt_toolkit.application import get_app_session
    from prompt_toolkit.keys import Keys

    keyboard = get_app_session().input

    def read() -> None:
        for press in keyboard.read_keys():
            if not view.press(press.key.value if isinstance(press.key, Keys) else press.key):
                on_quit()
        on_key()

    with keyboard.raw_mode(), keyboard.attach(read):
        yield


async def from_core(arguments: argparse.Namespace) -> Events:
    """Events of the core at `--address`."""
    from nanovllm.frontend.async_llm import AsyncLLM
    from nanovllm.watch.feed import EngineFeed

    llm = await AsyncLLM.connect(
        arguments.address, skip_tokenizer_init=True, keys=arguments.keys, on_core_death="fail"
    )
    try:
        async with contextlib.aclosing(EngineFeed(llm).events()) as events:
            async for event in events:
                yield event
    finally:
        await llm.close()


async def from_server(url: str, key: str | None) -> Events:
    """Events of the server at `url`. Its lines are read in a thread, which ends with the server or
    this process."""
    response = await asyncio.to_thread(_open, f"{url.rstrip('/')}/v1/engine/events", key)
    loop = asyncio.get_running_loop()
    lines: asyncio.Queue[bytes] = asyncio.Queue()

    def read() -> None:
        with contextlib.suppress(OSError, HTTPException, ValueError, RuntimeError):
            for line in response:  # ends, or fails, when either side closes; the loop may be gone
                loop.call_soon_threadsafe(lines.put_nowait, line)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(lines.put_nowait, b"")

    threading.Thread(target=read, daemon=True).start()
    while line := await lines.get():
        if line.startswith(b"data: {"):
            yield msgspec.json.decode(line.removeprefix(b"data: "), type=EngineEvent)
        elif line.startswith(b":"):
            yield None


def _open(url: str, key: str | None) -> urllib.response.addinfourl:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        request = urllib.request.Request(url, headers=headers)
        found: urllib.response.addinfourl = urllib.request.urlopen(request, timeout=SILENCE_S)
        return found
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode(errors="replace")
        raise ValueError(f"{url} answers {error.code}: {text}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--url: {url} cannot be reached ({error})") from None
