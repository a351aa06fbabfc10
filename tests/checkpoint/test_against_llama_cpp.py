"""GGUF files are tokenized as llama.cpp does it, on random texts with special tokens.

Needs the package `xllamacpp` (100 MB, so it is in no extra), and for the vocabularies of Mistral
`mistral_common`.
"""

import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
from tokenizers import ByteLevelBPETokenizer

from nanovllm.checkpoint.gguf_tokenizer import SPLITS
from nanovllm.checkpoint.locate import Checkpoint, locate
from nanovllm.frontend.tokenizer import Tokenizer
from tests.checkpoint.gguf_writing import write_gguf
from tests.checkpoint.llama_cpp import LlamaCppVocabulary
from tests.checkpoint.sentencepiece_models import (
    CODE,
    NAMED,
    ROOT,
    USER_DEFINED,
    WORDS,
    as_gguf,
    random_text,
    train,
)

pytest.importorskip("xllamacpp", reason="the reference is llama.cpp, in the package xllamacpp")

NUM_TEXTS = 700
SPECIAL = ["<s>", "</s>", *NAMED, *USER_DEFINED]


def check(path: Path, special: list[str], texts: Callable[[str], str] = str) -> None:
    tokenizer, reference = Tokenizer.load(str(path)), LlamaCppVocabulary(path)
    rng = random.Random(0)
    for _ in range(NUM_TEXTS):
        text = texts(random_text(rng, special))
        assert tokenizer.encode(text) == reference.encode(text), repr(text)
    assert Checkpoint(path, "gguf").eos_token_ids() == reference.end_ids()


@pytest.mark.parametrize("facts", [{}, {"add_space_prefix": False}, {"add_eos_token": True}])
def test_sentencepiece(tmp_path: Path, facts: dict[str, Any]) -> None:
    check(as_gguf(train(), tmp_path / "spm.gguf", **facts), SPECIAL)


@pytest.mark.parametrize("version", ["tokenizer.model.v1", "240216.model.v2", "240323.model.v3"])
def test_mistrals_vocabularies(tmp_path: Path, version: str) -> None:
    package = find_spec("mistral_common")  # not imported: the files are all it is wanted for
    if package is None or not package.submodule_search_locations:
        pytest.skip("the vocabularies are in the wheel of mistral_common")
    (model,) = Path(package.submodule_search_locations[0], "data").glob(f"*{version}")
    check(as_gguf(model.read_bytes(), tmp_path / "spm.gguf"), ["<s>", "[INST]", "[/INST]", "</s>"])


@pytest.mark.parametrize("split", SPLITS)
def test_byte_level_bpe_with_every_known_split(tmp_path: Path, split: str) -> None:
    trained = ByteLevelBPETokenizer()
    corpus = [*(ROOT / "README.md").read_text().split("\n"), *CODE, " ".join(WORDS)]
    trained.train_from_iterator(corpus, vocab_size=1500, show_progress=False)
    vocabulary = trained.get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.__getitem__), *SPECIAL]
    trained.save_model(str(tmp_path))
    merges = (tmp_path / "merges.txt").read_text().split("\n")
    control = {"<s>", "</s>", *NAMED}
    facts = {
        "model": "gpt2",
        "pre": split,
        "tokens": tokens,
        "token_type": [3 if t in control else 4 if t in USER_DEFINED else 1 for t in tokens],
        "merges": [merge for merge in merges if merge and not merge.startswith("#version")],
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
    }
    facts = {f"tokenizer.ggml.{key}": value for key, value in facts.items()}
    path = write_gguf(tmp_path / "bpe.gguf", facts={**facts, "llama.vocab_size": len(tokens)})
    check(path, SPECIAL, without_marks)


@pytest.mark.model
def test_smollm2() -> None:
    check(locate("smollm2").path, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])


def without_marks(text: str) -> str:
    """Combining marks part the two: vocabularies like Qwen's expect composed characters, which
    llama.cpp leaves out, and it knows no marks in Tekken's pattern."""
    kept = [c for c in text if not "\u0300" <= c <= "\u036f" and not "\u0483" <= c <= "\u0600"]
    return normalize("NFC", "".join(kept))
