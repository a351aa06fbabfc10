"""A fast tokenizer from the vocabulary inside a GGUF file.

Called by `Tokenizer`. Byte-level BPE is built here, SentencePiece's in `sentencepiece_bpe`, both in
a fraction of a second. A GGUF file stores the merges but only the *name* of how text is split
before them (`tokenizer.ggml.pre`): the splits are given here, as the models published them.
Anything else goes through transformers.
"""

from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from nanovllm.checkpoint import sentencepiece_bpe
from nanovllm.checkpoint.special_tokens import gguf_token_kinds

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LINES_AND_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES_AND_SPACE
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_PUNCTUATION_AND_SPACE}"
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|{_LINES_AND_SPACE}"
_BAILING = (
    rf"'(?i:[sdmt]|ll|ve|re)|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED_WORDS = (  # each up to where capitals begin anew
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*",
)
_PATHS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _LINES_AND_SPACE
_TEKKEN = "|".join((*_CASED_WORDS, r"\p{N}", _PATHS_AND_SPACE))
_O200K = "|".join(
    (*(f"{word}{_CONTRACTIONS}?" for word in _CASED_WORDS), r"\p{N}{1,3}", _PATHS_AND_SPACE)
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS_ALONE = (r"\p{N}", _GPT2)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
_DEEPSEEK_LLM = (
    r"[\r\n]",
    "\\s?[\\p{Lu}\\p{Ll}\\p{Lt}&&[^\u10d0-\u10ff]]+",  # Georgian had no case when it was made
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
    r"\p{N}+",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES_AND_SPACE}",
)
# What llama.cpp does where a file does not say; such files are old, and few were made for it.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

_OF_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0")
_OF_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4")
_OF_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_OF_QWEN2 = ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan", "grok-2")

# tokenizer.ggml.pre → patterns, each of which cuts what the one before has left. What is not in
# this table cannot be known.
SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    **dict.fromkeys((*_OF_GPT2, "gigachat", "mellum", "a.x-4.0"), (_GPT2,)),
    **dict.fromkeys(_OF_DIGITS, _DIGITS_ALONE),
    **dict.fromkeys((*_OF_LLAMA3, "smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(_OF_QWEN2, (_QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), (_O200K,)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK_V3),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), (_BAILING,)),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (_BLOOM,)),
    "viking": (_BLOOM, r"\p{N}"),
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-llm": _DEEPSEEK_LLM,
    "falcon": _FALCON,
    "seed-coder": (_SEED_CODER,),
    "tekken": (_TEKKEN,),
}
# A word in the vocabulary is one token, even if no merges lead there; and BOS goes in front.
WHOLE_WORDS_FIRST = frozenset((*_OF_LLAMA3, "tekken"))
BOS_BY_DEFAULT = WHOLE_WORDS_FIRST
COMPOSED = {"qwen2"}  # these vocabularies expect Unicode in normal form C


def build(path: Path, metadata: dict[str, Any]) -> FastTokenizer:
    """The tokenizer of the GGUF file at `path`, without a post-processor.

    Raises `ValueError` if the file has none, or one whose splitting nobody has named.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise ValueError(f"{path} holds no tokenizer: name one with tokenizer=<directory or id>")
    try:
        if kind == "gpt2":
            return _byte_level_bpe(metadata)
        if kind == "llama":
            return _sentencepiece_bpe(path, metadata)
    except Exception as error:  # the Rust library raises nothing more specific
        raise ValueError(
            f"the tokenizer in {path} cannot be used ({error}): fetch it again, or name another "
            "with tokenizer=<directory or id>"
        ) from error
    return _through_transformers(path, kind)


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether prompts begin with the BOS token."""
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    by_default = sentencepiece or metadata.get("tokenizer.ggml.pre") in BOS_BY_DEFAULT
    return bool(metadata.get("tokenizer.ggml.add_bos_token", by_default))


def adds_eos(metadata: dict[str, Any]) -> bool:
    """Whether prompts end with the EOS token."""
    return bool(metadata.get("tokenizer.ggml.add_eos_token", False))


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
    sentencepiece_bpe.add_tokens(tokenizer, tokens, gguf_token_kinds(metadata))
    return tokenizer


def _sentencepiece_bpe(path: Path, metadata: dict[str, Any]) -> FastTokenizer:
    pieces: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] = metadata.get("tokenizer.ggml.scores", [])
    if len(scores) != len(pieces):
        raise ValueError(
            f"{path} has {len(pieces)} tokens and {len(scores)} scores (tokenizer.ggml.scores): "
            "convert the model again, or name the original tokenizer with "
            "tokenizer=<directory or id>"
        )
    return sentencepiece_bpe.build(
        pieces,
        scores,
        gguf_token_kinds(metadata),
        adds_space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
    )


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    if split not in SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre {split!r} is unknown (known: {', '.join(SPLITS)}): "
            "name the original tokenizer with tokenizer=<directory or id>"
        )
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in SPLITS[split]
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def _through_transformers(path: Path, kind: str) -> FastTokenizer:
    import transformers  # takes seconds, and few files need it

    try:
        slow = transformers.AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        tokenizer: FastTokenizer = slow.backend_tokenizer
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {path} ({kind!r}) cannot be converted ({error}): "
            "name the original one with tokenizer=<directory or id>"
        ) from error
    return tokenizer
