"""A conversation's commands, what is read as one message, and Markdown on a terminal."""

import io
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from nanovllm.chat import Chat, Read, _terminal_reader, read_message
from nanovllm.sampling_params import SamplingParams
from nanovllm.terminal import MarkdownTerminal, Terminal
from tests.test_cli import output


class Echo:
    """Answers with what it was told last."""

    def __init__(self) -> None:
        self.asked: list[list[tuple[str, str]]] = []
        self.params: list[SamplingParams] = []

    async def chat(self, messages: list[Any], params: SamplingParams) -> AsyncIterator[Any]:
        self.asked.append([(one["role"], one["content"]) for one in messages])
        self.params.append(params)
        yield output(messages[-1]["content"], finished=True)


def reading(*lines: str) -> Read:
    left = iter(lines)

    async def read(prompt: str) -> str | None:
        return next(left, None)

    return read


async def talk(*lines: str, system: str | None = None) -> Echo:
    llm = Echo()
    params = SamplingParams(temperature=0.7, output_kind="delta")
    await Chat(llm, Terminal(), params, system=system).run(reading(*lines))  # type: ignore[arg-type]
    return llm


async def test_system_and_sampling_can_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    llm = await talk(
        *("/system be brief", "a", "/set temperature 0", "/set seed 7", "/set max_tokens 5"),
        *("b", "/system", "/set", "/reset", "c"),
    )
    system = ("system", "be brief")
    assert llm.asked[0] == [system, ("user", "a")]
    assert llm.asked[1] == [system, ("user", "a"), ("assistant", "a"), ("user", "b")]
    assert llm.asked[2] == [system, ("user", "c")]
    first, second, _ = llm.params
    assert (first.temperature, first.seed, first.output_kind) == (0.7, None, "delta")
    assert (second.temperature, second.seed, second.max_tokens) == (0.0, 7, 5)
    err = capsys.readouterr().err
    assert err.count("system: be brief\n") == 2
    assert "temperature 0.0, top_p 1.0" in err and "seed 7" in err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set warmth 3", "warmth cannot be set: temperature, top_p"),
        ("/set temperature", "/set temperature VALUE: the value is missing"),
        ("/set temperature hot", "temperature: Expected `float`"),
        ("/set temperature -1", "temperature"),
        ("/save", "/save FILE: the file is missing"),
        ("/save /nowhere/at/all", "/nowhere/at/all: No such file"),
        ("/sing", "unknown command /sing. /help lists"),
    ],
)
async def test_mistakes_cost_a_line(
    line: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = await talk(line, "still here")
    assert told in capsys.readouterr().err
    assert llm.asked == [[("user", "still here")]] and llm.params[0].temperature == 0.7


async def test_conversations_are_saved(tmp_path: Path) -> None:
    await talk("ä", f"/save {tmp_path}/a.json", f"/save {tmp_path}/a.md", system="be kind")
    roles = [("system", "be kind"), ("user", "ä"), ("assistant", "ä")]
    saved = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert saved == [{"role": role, "content": content} for role, content in roles]
    assert "**user**\n\nä\n" in (tmp_path / "a.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (["a", "b"], ["a", "b"]),
        (["a\\", "b", "c"], ["a\nb", "c"]),
        (["a\\"], ["a\n".strip()]),
        (['"""', "a", "", "/b", '"""', "c"], ["a\n\n/b", "c"]),
        (['"""', "a"], ["a"]),
    ],
)
async def test_messages_of_several_lines(lines: list[str], messages: list[str]) -> None:
    read, found = reading(*lines), []
    while (message := await read_message(read)) is not None:
        found.append(message)
    assert found == messages


async def test_a_terminal_edits_and_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = _terminal_reader()
        keys.send_text("one\x1b\rtwo\r")  # Alt-Enter, then Enter
        assert await read("> ") == "one\ntwo"
        keys.send_text("\x1b[A\x1b[A\r")  # up, within the message and beyond it
        assert await read("> ") == "one\ntwo"
        keys.send_text("\x03")
        assert await read("> ") == ""
        keys.send_text("\x04")
        assert await read("> ") is None
    history = tmp_path / "nanovllm" / "chat_history"
    assert "+one\n+two\n" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


async def test_a_home_that_cannot_be_written_to_costs_the_history_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("one\r")
        assert await _terminal_reader()("> ") == "one"


def laid_out(pieces: Iterable[str], *, height: int = 20) -> tuple[MarkdownTerminal, Console]:
    console = Console(file=io.StringIO(), width=40, height=height, force_terminal=True)
    terminal = MarkdownTerminal(console)
    for piece in pieces:
        terminal.write(piece)
    return terminal, console


def text_of(console: Console) -> str:
    """What would be left on the screen, without styles: lines that are erased are gone."""
    assert isinstance(console.file, io.StringIO)
    screen: list[str] = [""]
    for line in console.file.getvalue().split("\n"):
        erased = line.count("\x1b[1A")
        del screen[len(screen) - erased :]
        screen.append(line)
    from rich.ansi import AnsiDecoder

    return "\n".join(one.plain for one in AnsiDecoder().decode("\n".join(screen)))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_markdown_is_laid_out_block_by_block(size: int) -> None:
    text = "# Title\n\nSome **bold** text.\n\n```python\na = 1\n\nb = 2\n```\n\n2. two\n3. three"
    terminal, console = laid_out(text[at : at + size] for at in range(0, len(text), size))
    terminal.note("a note")
    terminal.end_answer()
    shown = text_of(console)
    assert "**" not in shown and "```" not in shown and "# Title" not in shown
    for part in ("Title", "Some bold text.", "a = 1", "b = 2", "2 two", "3 three"):
        assert part in shown, shown
    assert "a note" in shown
    terminal.write("and **more**")
    terminal.end_answer()
    assert "and more" in text_of(console)


def test_a_block_longer_than_the_screen_is_shown_by_its_end() -> None:
    terminal, console = laid_out((f"line {number}  \n" for number in range(50)), height=10)
    assert isinstance(console.file, io.StringIO)
    last = console.file.getvalue().rpartition("\x1b[2K")[2]
    assert "line 49" in last
    assert max(part.count("\n") for part in console.file.getvalue().split("\x1b[2K")) <= 10
    terminal.end_answer()
    assert "line 0" in text_of(console)
