"""What a model's files say of its special tokens: their names, and which of them end an output.

Read by `Checkpoint.eos_token_ids` in the core and by the frontend's `Tokenizer`. No tokenizer is
built here, so the core need not load one.
"""

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import msgspec

from nanovllm.checkpoint.json_file import read_json_if_there


class TokenKind(IntEnum):
    """The same numbers in GGUF (tokenizer.ggml.token_type) and in sentencepiece's ModelProto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


GGUF_NAMES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # the format's own spelling
    "pad_token": "padding",
    "mask_token": "mask",
}
SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # where a file gives none
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")

# GGUF files give one or two ends at most, and models know more: llama.cpp takes these names for
# the end of an output as well (llama_vocab::impl::load, special_eog_ids).
END_NAMES = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek's own bars
        "[e~[",
        "<|fim_pad|>",
        "<fim-pad>",
        "<fim_pad>",
        "<PAD>",
        "[PAD]",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
        "<|file_sep|>",
    }
)
# Names that end nothing where all of some others are there: a harmony message ends with <|end|>
# and the output goes on, and Gemma 4 writes </s> as text.
NO_END_BESIDE = {
    "<|end|>": [{"<|return|>", "<|call|>"}, {"<|call|>", "<|flush|>"}, {"<|calls|>", "<|flush|>"}],
    "</s>": [{"<|tool_response>"}],
}


# ---- GGUF metadata


def gguf_special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """ "bos_token", "eos_token", … → its text, for those that the file has."""
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    found = {name: _gguf_id(metadata, key) for name, key in GGUF_NAMES.items()}
    if metadata.get("tokenizer.ggml.model") == "llama":
        for name, token_id in SENTENCEPIECE_IDS.items():
            if found[name] is None and token_id < len(tokens):
                found[name] = token_id
    return {name: tokens[token_id] for name, token_id in found.items() if token_id is not None}


def gguf_end_ids(metadata: Mapping[str, Any]) -> set[int]:
    """Every id that ends an output: those that the file names as such, and `END_NAMES` in it."""
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    named = {key: _gguf_id(metadata, key) for key in END_KEYS}
    if named["eos"] is None and metadata.get("tokenizer.ggml.model") == "llama":
        named["eos"] = SENTENCEPIECE_IDS["eos_token"]
    ends = {token_id for token_id in named.values() if token_id is not None}
    ends |= set(_ends_by_name(metadata))
    texts = {tokens[token_id]: token_id for token_id in ends}
    for name, companies in NO_END_BESIDE.items():
        if any(company <= texts.keys() for company in companies):
            ends.discard(texts.get(name, -1))
    return ends


def gguf_token_kinds(metadata: Mapping[str, Any]) -> list[int]:
    """The `TokenKind` of every token. What ends an output is a control token, whatever the file
    says: some converters have made normal ones of <|im_end|> and its like."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds = list(metadata.get("tokenizer.ggml.token_type", []))[: len(tokens)]
    kinds += [int(TokenKind.NORMAL)] * (len(tokens) - len(kinds))
    for token_id in _ends_by_name(metadata):
        kinds[token_id] = TokenKind.CONTROL
    return kinds


def _ends_by_name(metadata: Mapping[str, Any]) -> list[int]:
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    marked = {TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN}
    found = [(token_id, token) for token_id, token in enumerate(tokens) if token in END_NAMES]
    return [
        token_id
        for token_id, token in found
        if (token_id < len(kinds) and kinds[token_id] in marked) or not _is_text(token, metadata)
    ]


def _is_text(token: str, metadata: Mapping[str, Any]) -> bool:
    """Whether other tokens merge into this one: Qwen's </s> is a piece of HTML and ends nothing."""
    merges: list[str] | None = metadata.get("tokenizer.ggml.merges")
    if merges is not None:
        return any(merge.replace(" ", "", 1) == token for merge in merges)
    tokens = set(metadata["tokenizer.ggml.tokens"])
    return any(token[:cut] in tokens and token[cut:] in tokens for cut in range(1, len(token)))


def _gguf_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """None also for an id that no token has."""
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    num_tokens = len(metadata.get("tokenizer.ggml.tokens", ()))
    return token_id if isinstance(token_id, int) and 0 <= token_id < num_tokens else None


# ---- a directory of a tokenizer's files


def special_tokens(directory: Path) -> dict[str, str]:
    """ "bos_token", "eos_token", … → its text, as tokenizer_config.json and special_tokens_map.json
    tell. Of the two the map is older; where a config lists its added tokens it comes first, else
    the map does, as in transformers."""
    config = read_json_if_there(directory / "tokenizer_config.json")
    by_config = _named(config)
    by_map = _named(read_json_if_there(directory / "special_tokens_map.json"))
    if "added_tokens_decoder" in config:
        return {**by_map, **by_config}
    return {**by_config, **by_map}


def eos_token_id(directory: Path) -> int | None:
    """The id of the tokenizer's own EOS token, if its files name one."""
    eos = special_tokens(directory).get("eos_token")
    if eos is None:
        return None
    config = read_json_if_there(directory / "tokenizer_config.json")
    for token_id, entry in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and entry.get("content") == eos and token_id.isdigit():
            return int(token_id)
    return _id_in_tokenizer_json(directory / "tokenizer.json", eos)


def _named(content: Mapping[str, Any]) -> dict[str, str]:
    """The entries `…_token`, which are texts, or objects with the text in them."""
    found = {}
    for name, value in content.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[Any] = []  # a list, by id, in Unigram models


class _TokenizerJson(msgspec.Struct):
    added_tokens: list[_AddedToken] = []
    model: msgspec.Raw = msgspec.Raw(b"{}")


def _id_in_tokenizer_json(path: Path, token: str) -> int | None:
    if not path.is_file():
        return None
    try:
        content = msgspec.json.decode(path.read_bytes(), type=_TokenizerJson)
        for added in content.added_tokens:
            if added.content == token:
                return added.id
        vocab = msgspec.json.decode(content.model, type=_Model).vocab
    except msgspec.DecodeError as error:
        raise ValueError(f"model: {path} cannot be read ({error}): fetch it again") from None
    if isinstance(vocab, dict):
        return vocab.get(token)
    texts = [entry[0] if isinstance(entry, list) and entry else None for entry in vocab]
    return texts.index(token) if token in texts else None
