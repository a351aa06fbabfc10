"""Text to token ids and back, and chat messages to prompts.

Owns the vocabulary. `AsyncLLM` calls it; the detokenizers read its pieces. Whatever the source
(`tokenizer_files`), it ends as one Rust tokenizer from `tokenizers`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders

from nanovllm.checkpoint import tokenizer_files
from nanovllm.checkpoint.locate import locate_tokenizer
from nanovllm.checkpoint.tokenizer_files import DEFAULT_TEMPLATE
from nanovllm.frontend.chat_template import ChatTemplate, Message
from nanovllm.frontend.encoding_process import LongTexts

TOOL_TEMPLATE = "tool_use"  # the name of the template for conversations with tools, if there is one


# The steps of decoders that `PieceSpelling` understands, in tokenizer.json's names for them.
SPELLING_STEPS = re.compile("(Replace )*(ByteFallback )?(Fuse (Strip )?)?")
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class PieceSpelling(NamedTuple):
    """How text is made of a SentencePiece vocabulary's tokens, as its decoder says it.

    replacements: in each token's own text ("▁" → " "). has_bytes: <0x0A> and its like are bytes.
    stripped, num_stripped: so many of this character go from the beginning of the whole text.
    """

    replacements: tuple[tuple[str, str], ...]
    has_bytes: bool
    stripped: str
    num_stripped: int

    @classmethod
    def of(cls, decoder: Any) -> "PieceSpelling | None":
        """None if the decoder does anything else. decoder: as in tokenizer.json."""
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        if not SPELLING_STEPS.fullmatch("".join(f"{step['type']} " for step in steps)):
            return None
        replacements: list[tuple[str, str]] = []
        has_bytes, stripped, num_stripped = False, "", 0
        for step in steps:
            match step:
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    replacements.append((old, new))
                case {"type": "Strip", "content": str(what), "start": int(count), "stop": 0}:
                    stripped, num_stripped = what, count
                case {"type": "ByteFallback" | "Fuse" as kind}:
                    has_bytes = has_bytes or kind == "ByteFallback"
                case _:  # a pattern, or a strip at the end
                    return None
        return cls(tuple(replacements), has_bytes, stripped, num_stripped)

    def piece(self, token: str) -> str | int:
        """What a token adds to a text: characters, or one byte."""
        for old, new in self.replacements:
            token = token.replace(old, new)
        byte = BYTE_PIECE.fullmatch(token) if self.has_bytes else None
        return token if byte is None else int(byte[1], 16)


class Tokenizer:
    """The tokenizer of one model. Safe to share between threads.

    vocab_size counts the tokenizer's own entries; a model's embedding table may be padded beyond.
    special_tokens maps "bos_token", "eos_token", … to their text, where the model has them.
    chat_template, tool_template: the texts of those for conversations without and with tools.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        """chat_template: one, or several by name."""
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        if isinstance(chat_template, str):
            chat_template = {DEFAULT_TEMPLATE: chat_template}
        self._set_templates(chat_template or {})
        self._texts: dict[int, str] = {}
        self.special_tokens = special_tokens or {}
        self.vocab_size = fast.get_vocab_size(with_added_tokens=True)
        added = fast.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.byte_level = isinstance(fast.decoder, decoders.ByteLevel)
        self.piece_spelling = None if fast.decoder is None else _piece_spelling(fast.decoder)
        self.long_texts = LongTexts(self.to_json)

    @classmethod
    def load(cls, name: str) -> "Tokenizer":
        """Of a model (alias, .gguf file, Hugging Face id) or of a directory with a tokenizer.

        Raises `ValueError` with the remedy if there is none.
        """
        return cls.from_path(locate_tokenizer(name))

    @classmethod
    def from_path(cls, path: Path) -> "Tokenizer":
        """From a GGUF file, or a directory with tokenizer.json or what transformers can read."""
        make = tokenizer_files.from_directory if path.is_dir() else tokenizer_files.from_gguf
        parts = make(path)
        return cls(
            parts.fast, special_tokens=parts.special_tokens, chat_template=parts.chat_templates
        )

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: put BOS in front, for models that want it.

        As a batch of one, which finds no offsets, and unlike `encode` lets other threads run.
        """
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    @cached_property
    def most_chars(self) -> int | None:
        """Of a text that one token can stand for; None where that is not known, since texts are
        changed before they are cut into tokens, or tokens take the white space around them."""
        added = self._fast.get_added_tokens_decoder().values()
        strips = any(token.lstrip or token.rstrip for token in added)
        if strips or not self.spells_bytes or self._fast.normalizer is not None:
            return None
        return max(map(len, self._fast.get_vocab()))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, without special tokens; other threads may run meanwhile."""
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary become nothing."""
        return self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text, special or not; cached, for log-probabilities."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._token_text(token_id)
        return text

    def _token_text(self, token_id: int) -> str:
        if self.piece_spelling is None:
            return self.decode([token_id], skip_special_tokens=False)
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_piece(self, token_id: int) -> str | int:
        """What a token of a `piece_spelling` adds to a text: characters, or one byte."""
        assert self.piece_spelling is not None
        token = self._fast.id_to_token(token_id)
        return "" if token is None else self.piece_spelling.piece(token)

    @property
    def spells_bytes(self) -> bool:
        """Whether `token_bytes` can tell what a token adds to a text."""
        return self.byte_level or self.piece_spelling is not None

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text. Only a vocabulary that `spells_bytes` can tell.

        A token with a character outside the byte alphabet (an added one) stands for its own text.
        """
        if self.piece_spelling is not None:
            piece = self.token_piece(token_id)
            return bytes([piece]) if isinstance(piece, int) else piece.encode()
        assert self.byte_level
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(map(BYTE_OF_CHAR.__getitem__, token))
        except KeyError:
            return token.encode()

    def to_json(self) -> str:
        """As the text of a tokenizer.json."""
        return self._fast.to_str()

    def apply_chat_template(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`, special tokens included: encode it without adding any.

        chat_template: the name of the one to use; default: as transformers chooses, "tool_use"
        where there are `tools`, else "default". variables: whatever else the template reads, such
        as `tools` and `documents`, which are None where nobody gives them. Raises `ValueError` if
        the model has no such template, or if its template refuses the messages.
        """
        template = self._find_template(chat_template, has_tools=variables.get("tools") is not None)
        known: dict[str, Any] = {"tools": None, "documents": None, **self.special_tokens}
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return template.render({**known, **variables, **given})

    def set_chat_template(self, source: str) -> None:
        """Use this one instead of the model's own."""
        self._set_templates({DEFAULT_TEMPLATE: source})

    def start_chat_template(self) -> None:
        """If there is one: its process takes a moment to start, for which no prompt waits then."""
        if DEFAULT_TEMPLATE in self._templates:
            self._templates[DEFAULT_TEMPLATE].start()

    def _set_templates(self, sources: Mapping[str, str]) -> None:
        self._templates = {name: ChatTemplate(source) for name, source in sources.items()}
        # Their own texts: what they mention tells how the model writes.
        self.chat_template = sources.get(DEFAULT_TEMPLATE)
        self.tool_template = sources.get(TOOL_TEMPLATE, self.chat_template)

    def _find_template(self, name: str | None, *, has_tools: bool) -> ChatTemplate:
        templates = self._templates
        if not templates:
            raise ValueError("the model has no chat template: use generate with a plain prompt")
        if name is None:
            name = TOOL_TEMPLATE if has_tools and TOOL_TEMPLATE in templates else DEFAULT_TEMPLATE
        if name not in templates:
            raise ValueError(
                f"chat_template: the model has none of the name {name!r}: "
                f"name one of {', '.join(sorted(templates))}"
            )
        return templates[name]

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._fast.token_to_id(token)


def _piece_spelling(decoder: decoders.Decoder) -> PieceSpelling | None:
    return PieceSpelling.of(json.loads(decoder.__getstate__()))


def _byte_of_char() -> dict[str, int]:
    """The byte alphabet of GPT-2 (openai/gpt-2, encoder.py): printable bytes stand for themselves,
    the others, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(rest)})
    return alphabet


BYTE_OF_CHAR = _byte_of_char()
