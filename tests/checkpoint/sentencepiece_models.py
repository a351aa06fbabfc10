"""A small SentencePiece model, trained here, and texts that try what tokenizers get wrong."""

import io
import random
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from tests.checkpoint.gguf_writing import write_gguf

ROOT = Path(__file__).parents[2]
NAMED = ["[INST]", "[/INST]", "<|im_end|>"]  # control tokens beside <s> and </s>
USER_DEFINED = ["<think>", "</think>"]
TEXT = (
    "Hello Paris the capital quick fox straße naïve Привет мир 日本語 한국어 ไทย هندي 😀 "
    "👩‍👩‍👧‍👦 🇩🇪 123 4567 3.14 ( ) [ ] { } ... !!! don't I'll"
)
WORDS = TEXT.split()
CODE = [
    "def f(x):\n    return x**2\n",
    'for(int i=0;i<10;i++){\n\t\tprintf("%d\\n", i);\n}',
    "<div class='a'>  </div>",
    "#" * 20,
    "=" * 35,
    " " * 9,
]
ODD = ["\n", "\n\n", "\t", "\r\n", "\n    ", "▁", "▁▁", "\ufffd", "é", "a" * 17]


def random_text(rng: random.Random, special: list[str]) -> str:
    """Words, runs of spaces, code, odd characters, and some of the `special` tokens."""
    found = []
    for _ in range(rng.randrange(1, 14)):
        kinds = [WORDS, WORDS, WORDS, CODE, ODD, [" " * rng.randrange(1, 12)], special or [" "]]
        kinds.append(["".join(chr(rng.randrange(32, 0x600)) for _ in range(rng.randrange(1, 8)))])
        kinds.append([rng.choice("abe=-#*x ") * rng.randrange(1, 40)])
        found += [rng.choice(rng.choice(kinds)), rng.choice(["", " "])]
    return "".join(found)


def train(**options: Any) -> bytes:
    """A `tokenizer.model`, of the kind that Llama 2's and Mistral's are."""
    corpus = [*(ROOT / "README.md").read_text().split("\n"), *CODE, " ".join(WORDS)] * 2
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 900,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "control_symbols": NAMED,
        "user_defined_symbols": USER_DEFINED,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, **{**defaults, **options}
    )
    return model.getvalue()


def as_gguf(model: bytes, path: Path, **facts: Any) -> Path:
    """The same vocabulary in a GGUF file. facts: of the tokenizer, or to overrule one."""
    content = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined] # made at import
    content.ParseFromString(model)
    given = {
        "model": "llama",
        "tokens": [piece.piece for piece in content.pieces],
        "scores": [piece.score for piece in content.pieces],
        "token_type": [piece.type for piece in content.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **facts,
    }
    return write_gguf(path, facts={f"tokenizer.ggml.{key}": value for key, value in given.items()})
