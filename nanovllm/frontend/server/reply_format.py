"""How a model writes tool calls and reasoning, and the parsing of one answer.

`Serving` finds the format out once, from the settings or the model's chat template; the chat
endpoint makes a `ReplyParser` per answer of a request that needs one.
"""

import secrets
import string
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from nanovllm.frontend.server import reasoning
from nanovllm.frontend.server.bodies import ChatBody
from nanovllm.frontend.server.reasoning import ThinkSplitter
from nanovllm.frontend.server.sampling import called_tools
from nanovllm.frontend.server.settings import ServerSettings
from nanovllm.frontend.server.tool_parsers import hermes, llama3, mistral
from nanovllm.frontend.server.tool_parsers.forced import NamedParser, RequiredParser
from nanovllm.frontend.server.tool_parsers.pieces import (
    CallArguments,
    CallBegin,
    Content,
    Piece,
    Reasoning,
    ToolParser,
)
from nanovllm.frontend.tokenizer import Tokenizer

ToolParserFactory = Callable[[Collection[str]], ToolParser]
ALPHANUMERIC = string.ascii_letters + string.digits


class ToolFormat(NamedTuple):
    """`sign`: what a chat template of such a model mentions. `markers`: of which the text of an
    answer may be in need though they are special tokens. `id_length`: what the template takes."""

    make_parser: ToolParserFactory
    sign: str
    markers: tuple[str, ...]
    id_length: int = 24


# In the order in which signs are looked for.
TOOL_FORMATS = {
    "mistral": ToolFormat(mistral.MistralParser, "[TOOL_CALLS]", (mistral.MARKER,), 9),
    "hermes": ToolFormat(hermes.HermesParser, "<tool_call>", (hermes.OPEN, hermes.CLOSE)),
    "llama3_json": ToolFormat(llama3.Llama3Parser, "python_tag", ()),
}
FALLBACK = "hermes"  # what `tool_prompt` asks for


class ReplyFormat(NamedTuple):
    """keeps_special_tokens: some markers are special tokens, which must stay in the text."""

    tools: ToolFormat | None
    template_knows_tools: bool
    has_reasoning: bool
    begins_inside: bool
    keeps_special_tokens: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, settings: ServerSettings) -> "ReplyFormat":
        """Of the model with this tokenizer."""
        template = (tokenizer.tool_template if tokenizer is not None else None) or ""
        knows_tools = "tools" in template
        name: str | None = settings.tool_call_parser
        if name == "auto":
            signs = [key for key, form in TOOL_FORMATS.items() if form.sign in template]
            name = signs[0] if signs else None if knows_tools else FALLBACK
        tools = TOOL_FORMATS.get(name or "none")
        mode = settings.reasoning_parser
        has_reasoning = mode != "none" and (mode != "auto" or reasoning.CLOSE in template)
        markers = {*(tools.markers if tools else ())}
        if has_reasoning:
            markers |= {reasoning.OPEN, reasoning.CLOSE}
        special = set()
        if tokenizer is not None:
            special = {tokenizer.token_text(token_id) for token_id in tokenizer.special_ids}
        inside = mode == "deepseek_r1"
        return cls(tools, knows_tools, has_reasoning, inside, bool(markers & special))

    def thinks_first(self, prompt: str) -> bool:
        """Whether the answer to `prompt` begins within the model's reasoning."""
        text = prompt.rstrip()
        if not self.has_reasoning or text.endswith(reasoning.CLOSE):
            return False
        return self.begins_inside or text.endswith(reasoning.OPEN)

    def make_parser(self, body: ChatBody, *, thinks_first: bool) -> "ReplyParser | None":
        """For one answer; None if its text is content and nothing else."""
        forced, names = called_tools(body), {tool.function.name for tool in body.tools or []}
        tools: ToolParser | None = None
        if forced == "required":
            tools = RequiredParser(names)
        elif forced is not None:
            tools = NamedParser(forced)
        elif names and body.tool_choice != "none" and self.tools is not None:
            tools = self.tools.make_parser(names)
        splitter = None
        if self.has_reasoning and (forced is None or thinks_first):
            splitter = ThinkSplitter(inside=thinks_first)
        if tools is None and splitter is None:
            return None
        return ReplyParser(
            splitter,
            tools,
            max_calls=1 if body.parallel_tool_calls is False else None,
            with_reasoning=body.include_reasoning is not False,
        )

    def new_call_id(self) -> str:
        if self.tools is not None and self.tools.id_length == 9:  # Mistral's templates insist
            return "".join(secrets.choice(ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


class ReplyParser:
    """Splits the text of one answer into reasoning, content and calls, as it comes.

    max_calls: later ones are left out. with_reasoning: False leaves the reasoning out.
    """

    def __init__(
        self,
        splitter: ThinkSplitter | None,
        tools: ToolParser | None,
        *,
        max_calls: int | None = None,
        with_reasoning: bool = True,
    ) -> None:
        self._splitter = splitter
        self._tools = tools
        self._max_calls = max_calls
        self._num_calls = 0
        self._with_reasoning = with_reasoning

    def feed(self, text: str) -> list[Piece]:
        parts = [Content(text)] if self._splitter is None else self._splitter.feed(text)
        return self._wanted(self._parse(parts))

    def finish(self) -> list[Piece]:
        pieces = [] if self._splitter is None else self._parse(self._splitter.finish())
        return self._wanted(pieces + ([] if self._tools is None else self._tools.finish()))

    def _parse(self, parts: Sequence[Piece]) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            if self._tools is not None and isinstance(part, Content):
                pieces += self._tools.feed(part.text)
            else:
                pieces.append(part)
        return pieces

    def _wanted(self, pieces: list[Piece]) -> list[Piece]:
        return [piece for piece in pieces if self._is_wanted(piece)]

    def _is_wanted(self, piece: Piece) -> bool:
        self._num_calls += isinstance(piece, CallBegin)
        match piece:
            case Reasoning():
                return self._with_reasoning
            case CallBegin() | CallArguments():
                return self._max_calls is None or self._num_calls <= self._max_calls
            case Content():
                return True
