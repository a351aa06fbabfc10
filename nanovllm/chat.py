"""`nanovllm chat`: a conversation with a model, and the commands that its user may give.

Called by `cli`, which hands in the engine. What is read comes line by line, from a terminal with
editing and a history that is kept, or from a pipe.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nanovllm.places import state_directory
from nanovllm.sampling_params import SamplingParams
from nanovllm.terminal import Terminal, figures

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from nanovllm.frontend.async_llm import AsyncLLM

HELP = """\
/reset               forget the conversation
/system [TEXT]       show, or set, what the model is told first
/set [NAME VALUE]    show, or set, sampling: temperature, top_p, max_tokens, seed …
/save FILE           write the conversation, as Markdown if FILE ends in .md, else as JSON
/exit                end (or Ctrl-D); Ctrl-C stops an answer
A message goes on after Alt-Enter, after a final \\, and between two lines of \"\"\""""
SETTABLE = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
QUOTES = '"""'
Read = Callable[[str], Coroutine[Any, Any, str | None]]  # prompts; None at the end of input


class Chat:
    """One conversation: its messages, and how it is sampled."""

    def __init__(
        self, llm: "AsyncLLM", terminal: Terminal, params: SamplingParams, *, system: str | None
    ) -> None:
        self._llm = llm
        self._terminal = terminal
        self._params = params
        self._system = system
        self._messages: list[dict[str, str]] = []  # but for the system's
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: terminal.note(HELP),
            "/reset": self._reset,
            "/save": self._save,
            "/set": self._set,
            "/system": self._tell_system,
        }

    async def run(self, read: Read) -> None:
        """Until the user ends it, or there is nothing more to read."""
        self._terminal.note("/help lists commands; Ctrl-D ends the conversation.")
        while (said := await read_message(read)) is not None:
            command, _, rest = said.strip().partition(" ")
            if command in ("/exit", "/quit"):
                return
            if command.startswith("/"):
                self._obey(command, rest.strip())
            elif command:
                await self._say(said)

    @property
    def _all_messages(self) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self._system}] if self._system else []
        return first + self._messages

    async def _say(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        answer = await self._answer()
        if answer is None:
            self._messages.pop()
        else:
            self._messages.append({"role": "assistant", "content": answer})

    async def _answer(self) -> str | None:
        """Stream one answer; Ctrl-C keeps what has come so far. None if there is none."""
        from nanovllm.frontend.errors import RequestFailedError

        said: list[str] = []
        terminal = self._terminal

        async def stream() -> None:
            async for output in self._llm.chat(self._all_messages, self._params):
                said.append(output.outputs[0].text)
                terminal.write(said[-1])
                if output.finished:
                    terminal.end_answer()
                    terminal.note(figures(output))

        task = asyncio.ensure_future(stream())
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, task.cancel)
        try:
            await task
        except asyncio.CancelledError:  # the stream has aborted its request
            terminal.end_answer()
            terminal.note("(stopped)")
        except (ValueError, RequestFailedError) as error:  # the conversation no longer fits, say
            terminal.end_answer()
            terminal.note(f"{error}. /reset starts afresh.")
            return None
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        return "".join(said) or None

    # ---- commands

    def _obey(self, command: str, rest: str) -> None:
        act = self._commands.get(command)
        if act is None:
            self._terminal.note(f"unknown command {command}. /help lists those there are.")
            return
        try:
            act(rest)
        except ValueError as error:
            self._terminal.note(str(error))
        except OSError as error:
            self._terminal.note(f"{error.filename}: {error.strerror}")

    def _reset(self, _: str) -> None:
        self._messages.clear()
        self._terminal.note("(forgotten)")

    def _tell_system(self, text: str) -> None:
        if text:
            self._system = text
        self._terminal.note(f"system: {self._system or '(nothing)'}")

    def _set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        if name and name not in SETTABLE:
            raise ValueError(f"{name} cannot be set: {', '.join(SETTABLE)} can")
        if name and not value.strip():
            raise ValueError(f"/set {name} VALUE: the value is missing")
        if name:
            self._params = _changed(self._params, name, value.strip())
        shown = (f"{one} {getattr(self._params, one)}" for one in ([name] if name else SETTABLE))
        self._terminal.note(", ".join(shown))

    def _save(self, name: str) -> None:
        if not name:
            raise ValueError("/save FILE: the file is missing")
        path = Path(name).expanduser()
        if path.suffix == ".md":
            parts = [f"**{one['role']}**\n\n{one['content']}\n" for one in self._all_messages]
            path.write_text("\n".join(parts), "utf-8")
        else:
            content = json.dumps(self._all_messages, indent=2, ensure_ascii=False)
            path.write_text(content + "\n", "utf-8")
        self._terminal.note(f"{len(self._all_messages)} messages written to {path}")


def _changed(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """With one parameter as a text says. `ValueError`: it may not be that."""
    kind = next(one.type for one in msgspec.structs.fields(SamplingParams) if one.name == name)
    try:
        value = msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"{name}: {error}") from None
    values = msgspec.structs.asdict(params) | {name: value}
    return SamplingParams(**values)


# ---- reading


async def read_message(read: Read) -> str | None:
    r"""One message, which goes on after a line that ends with \, and up to a second line of
    quotes. None at the end of input."""
    line = await read("> ")
    if line is None:
        return None
    lines = [line]
    if line.strip() == QUOTES:
        lines.clear()
        while (line := await read(". ")) is not None and line.strip() != QUOTES:
            lines.append(line)
    else:
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            if (line := await read(". ")) is None:
                break
            lines.append(line)
    return "\n".join(lines)


def line_reader() -> Read:
    """Of standard input; with editing and a history on a terminal."""
    return _terminal_reader() if sys.stdin.isatty() else _read_pipe


async def _read_pipe(_: str) -> str | None:
    line = await asyncio.to_thread(sys.stdin.readline)
    return line.rstrip("\n") if line else None


def _terminal_reader() -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    history: History
    file = state_directory() / "chat_history"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    except OSError:  # a home that cannot be written to: what is said lives as long as the program
        history = InMemoryHistory()
    words = [line.split()[0] for line in HELP.splitlines() if line.startswith("/")]
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=WordCompleter(["/help", *words], sentence=True),
        complete_while_typing=False,
        multiline=True,  # Enter alone sends, see below: a text that is pasted keeps its lines
        key_bindings=_keys(),
        prompt_continuation=". ",
    )

    async def read(prompt: str) -> str | None:
        try:
            return await session.prompt_async(prompt)
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None

    return read


def _keys() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: "KeyPressEvent") -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: "KeyPressEvent") -> None:
        event.current_buffer.insert_text("\n")

    return keys
