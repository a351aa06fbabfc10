"""A fast tokenizer from the vocabulary inside a GGUF file.

Called by `Tokenizer`. Byte-level BPE is built here, in well under a tenth of a second. A GGUF file
stores the merges but only the *name* of how text is split before them (`tokenizer.ggml.pre`): the
splits are given here, as the models published them. Anything else goes through transformers.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _PUNCTUATION_AND_SPACE
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _PUNCTUATION_AND_SPACE
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # by tokenizer.ggml.pre; those in neither table cannot be known
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
GPT2_STYLE = {"default": False, "gpt-2": False, "smollm": True, "starcoder": True}  # digits alone?
WHOLE_WORDS_FIRST = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # a word in the vocabulary is
BOS_BY_DEFAULT = WHOLE_WORDS_FIRST  # one token, even if no merges lead there
COMPOSED = {"qwen2"}  # these vocabularies expect Unicode in normal form C


def build(path: Path, metadata: dict[str, Any]) -> FastTokenizer:
    """The tokenizer of the GGUF file at `path`, without a post-processor.

    Raises `ValueError` if the file has none, or one whose splitting nobody has named.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level_bpe(metadata)
    if kind is None:
        raise ValueError(f"{path} holds no tokenizer: name one with tokenizer=<directory or id>")
    return _through_transformers(path, kind)


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether prompts begin with the BOS token."""
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    by_default = sentencepiece or metadata.get("tokenizer.ggml.pre") in BOS_BY_DEFAULT
    return bool(metadata.get("tokenizer.ggml.add_bos_token", by_default))


def _byte_level_bpe(metadata: dict[str, Any]) -> FastTokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    split = metadata.get("tokenizer.ggml.pre", "default")
    # Files write merges as "left right", and neither side contains a space in the byte alphabet.
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = FastTokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=split in WHOLE_WORDS_FIRST,
        )
    )
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    if split in COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    added_kinds = (CONTROL, USER_DEFINED)
    added = [
        (token, kind) for token, kind in zip(tokens, types, strict=False) if kind in added_kinds
    ]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in added if kind == CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in added if kind == USER_DEFINED]
    )
    return tokenizer


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    if split in SPLITS:
        steps = [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        return pre_tokenizers.Sequence(steps)
    if split not in GPT2_STYLE:
        known = ", ".join([*GPT2_STYLE, *SPLITS])
        raise ValueError(
            f"tokenizer.ggml.pre {split!r} is unknown (known: {known}): "
            "name the original tokenizer with tokenizer=<directory or id>"
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if GPT2_STYLE[split]:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    return byte_level


def _through_transformers(path: Path, kind: str) -> FastTokenizer:
    import transformers  # takes seconds, and few files need it

    try:
        slow = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer: FastTokenizer = slow.backend_tokenizer
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {path} ({kind!r}) cannot be converted ({error}): "
            "name the original one with tokenizer=<directory or id>"
        ) from error
    return tokenizer
