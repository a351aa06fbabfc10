"""Text to token ids and back, and chat messages to prompts.

Owns the vocabulary. `AsyncLLM` calls it; `Detokenizer` reads its byte table. Whatever the source
(tokenizer.json, GGUF metadata, transformers), it ends as one Rust tokenizer from `tokenizers`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, processors

from nanovllm.checkpoint.gguf import GGUFFile
from nanovllm.checkpoint.locate import locate
from nanovllm.frontend import gguf_tokenizer
from nanovllm.frontend.chat_template import ChatTemplate, Message

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# What transformers may make a tokenizer of, if there is no tokenizer.json.
OTHER_FORMS = ("tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
GGUF_SPECIAL_TOKENS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


class Tokenizer:
    """The tokenizer of one model. Safe to share between threads.

    vocab_size counts the tokenizer's own entries; a model's embedding table may be padded beyond.
    special_tokens maps "bos_token", "eos_token", … to their text, where the model has them.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        fast.no_truncation()
        fast.no_padding()
        self._fast = fast
        self._template_source = chat_template
        self._template: ChatTemplate | None = None
        self._texts: dict[int, str] = {}
        self.special_tokens = special_tokens or {}
        self.vocab_size = fast.get_vocab_size(with_added_tokens=True)
        added = fast.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.byte_level = isinstance(fast.decoder, decoders.ByteLevel)

    @classmethod
    def load(cls, name: str) -> "Tokenizer":
        """Of a model (alias, .gguf file, Hugging Face id) or of a directory with a tokenizer.

        Raises `ValueError` with the remedy if there is none.
        """
        directory = Path(name).expanduser()  # perhaps one with a tokenizer and nothing else
        has_one = (directory / "tokenizer.json").is_file()
        return cls.from_path(directory if has_one else locate(name).path)

    @classmethod
    def from_path(cls, path: Path) -> "Tokenizer":
        """From a GGUF file, or a directory with tokenizer.json or what transformers can read."""
        return _from_directory(path) if path.is_dir() else _from_gguf(path)

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    @property
    def chat_template(self) -> str | None:
        """The template's own text: what it mentions tells how the model writes."""
        return self._template_source

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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, without special tokens; other threads may run meanwhile."""
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Bytes that are no UTF-8 become U+FFFD; ids outside the vocabulary become nothing."""
        return self._fast.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token on its own, special or not; cached, for log-probabilities."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text. Only byte-level vocabularies can tell.

        A token with a character outside the byte alphabet (an added one) stands for its own text.
        """
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
        self, messages: list[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for `messages`, special tokens included: encode it without adding any.

        variables: whatever else the model's template reads, such as `tools`. Raises `ValueError`
        if the model has no template, or if its template refuses the messages.
        """
        if self._template is None:
            if self._template_source is None:
                raise ValueError("the model has no chat template: use generate with a plain prompt")
            self._template = ChatTemplate(self._template_source)
        known: dict[str, Any] = {**self.special_tokens, **variables}
        return self._template.render(
            {**known, "messages": messages, "add_generation_prompt": add_generation_prompt}
        )

    def start_chat_template(self) -> None:
        """If there is one: its process takes a moment to start, for which no prompt waits then."""
        if self._template_source is not None:
            self._template = self._template or ChatTemplate(self._template_source)
            self._template.start()

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._fast.token_to_id(token)


def _from_gguf(path: Path) -> Tokenizer:
    metadata = GGUFFile(path).metadata
    fast = gguf_tokenizer.build(path, metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    special_tokens = {
        name: tokens[metadata[key]]
        for name, key in GGUF_SPECIAL_TOKENS.items()
        if metadata.get(key) is not None
    }
    _add_around_prompts(
        fast,
        special_tokens,
        bos=gguf_tokenizer.adds_bos(metadata),
        eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(fast, special_tokens=special_tokens, chat_template=template)


def _from_directory(path: Path) -> Tokenizer:
    config = _read_json(path / "tokenizer_config.json")
    source = path / "tokenizer.json"
    if source.is_file():
        try:
            fast = FastTokenizer.from_file(str(source))
        except Exception as error:  # the Rust library raises nothing more specific
            raise ValueError(f"{source} cannot be read: {error}") from None
    elif any((path / name).is_file() for name in OTHER_FORMS):
        fast = _through_transformers(path)
    else:
        raise ValueError(f"{path} holds no tokenizer: name one with tokenizer=<directory or id>")
    special_tokens = {
        name: value["content"] if isinstance(value, dict) else value
        for name in SPECIAL_TOKENS
        if (value := config.get(name)) is not None
    }
    if "add_bos_token" in config or "add_eos_token" in config:  # they overrule tokenizer.json
        bos, eos = config.get("add_bos_token", False), config.get("add_eos_token", False)
        _add_around_prompts(fast, special_tokens, bos=bos, eos=eos)
    return Tokenizer(
        fast, special_tokens=special_tokens, chat_template=_chat_template(path, config)
    )


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """A file of its own comes first; a list of named templates is used by its "default"."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _add_around_prompts(
    fast: FastTokenizer, special_tokens: dict[str, str], *, bos: bool, eos: bool
) -> None:
    """Make `encode` put BOS before and EOS after the text, as asked."""
    before = [special_tokens["bos_token"]] if bos and "bos_token" in special_tokens else []
    after = [special_tokens["eos_token"]] if eos and "eos_token" in special_tokens else []
    added = dict.fromkeys(before + after)
    fast.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, fast.token_to_id(token)) for token in added],
    )


def _through_transformers(path: Path) -> FastTokenizer:
    import transformers  # takes seconds, and few models need it

    try:
        slow = transformers.AutoTokenizer.from_pretrained(path)
        fast: FastTokenizer = slow.backend_tokenizer
    except Exception as error:
        raise ValueError(
            f"{path} holds no tokenizer.json, and transformers cannot make one ({error}): "
            "name another with tokenizer=<directory or id>"
        ) from error
    return fast


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return content


def _byte_of_char() -> dict[str, int]:
    """The byte alphabet of GPT-2 (openai/gpt-2, encoder.py): printable bytes stand for themselves,
    the others, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(rest)})
    return alphabet


BYTE_OF_CHAR = _byte_of_char()
