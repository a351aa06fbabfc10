"""SentencePiece's vocabularies from `tokenizer.model` and GGUF files give its own ids."""

import random
import sys
from pathlib import Path

import pytest
import sentencepiece

from nanovllm.frontend.tokenizer import Tokenizer
from tests.checkpoint.sentencepiece_models import NAMED, as_gguf, random_text, train


@pytest.fixture(scope="module")
def model() -> bytes:
    return train()


def of_gguf(model: bytes, tmp_path: Path, **facts: object) -> Tokenizer:
    return Tokenizer.load(str(as_gguf(model, tmp_path / "spm.gguf", **facts)))


def texts(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in tokenizer.encode(text)]


def test_random_texts_give_the_ids_of_sentencepiece(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    both = [Tokenizer.load(str(tmp_path)), of_gguf(model, tmp_path)]
    rng = random.Random(0)
    for _ in range(1000):
        text = random_text(rng, [])
        expected = [1, *reference.encode(text)]
        for tokenizer in both:
            assert tokenizer.encode(text) == expected, repr(text)
            assert tokenizer.decode(expected) == reference.decode(expected), repr(text)


def test_what_follows_a_special_token_begins_a_word(model: bytes, tmp_path: Path) -> None:
    tokenizer = of_gguf(model, tmp_path)
    words = tokenizer.encode("Hello", add_special_tokens=False)
    assert tokenizer.token_text(words[0]).startswith(" ")
    (inst,) = tokenizer.encode("[INST]", add_special_tokens=False)
    assert tokenizer.encode("<s>[INST]Hello", add_special_tokens=False) == [1, inst, *words]
    assert texts(tokenizer, "[INST] Hello")[:2] == ["<s>", "[INST]"]
    assert "".join(texts(tokenizer, "[INST] Hello")[2:]) == "  Hello"


def test_a_space_at_the_beginning_of_a_prompt_stays(model: bytes, tmp_path: Path) -> None:
    tokenizer = of_gguf(model, tmp_path)
    assert "".join(texts(tokenizer, " Hello")) == "<s>  Hello"
    assert tokenizer.encode(" Hello") != tokenizer.encode("Hello")
    assert tokenizer.decode(tokenizer.encode(" Hello")) == " Hello"


def test_add_space_prefix_false_adds_none(model: bytes, tmp_path: Path) -> None:
    tokenizer = of_gguf(model, tmp_path, add_space_prefix=False)
    assert "".join(texts(tokenizer, "Hello[INST]Hello")) == "<s>Hello[INST]Hello"
    assert tokenizer.decode(tokenizer.encode(" Hello")) == " Hello"


@pytest.mark.parametrize(("adds_bos", "adds_eos"), [(None, None), (False, True), (True, True)])
def test_what_goes_around_a_prompt(
    model: bytes, tmp_path: Path, adds_bos: bool | None, adds_eos: bool | None
) -> None:
    facts = {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
    tokenizer = of_gguf(model, tmp_path, **facts)
    ids = tokenizer.encode("Hello")
    assert (ids[0] == 1) is (adds_bos is not False) and (ids[-1] == 2) is (adds_eos is True)


def test_special_tokens_that_the_file_does_not_number_are_sentencepieces(
    model: bytes, tmp_path: Path
) -> None:
    tokenizer = of_gguf(model, tmp_path, bos_token_id=None, eos_token_id=10**6)
    assert tokenizer.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }


def test_a_file_without_scores_says_what_to_do(model: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0 scores.*tokenizer=<directory or id>"):
        of_gguf(model, tmp_path, scores=None)


def test_tokenizer_model_alone_knows_its_special_tokens(model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    for name in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = Tokenizer.load(str(name))
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.special_ids >= {0, 1, 2}
        assert len(tokenizer.encode("".join(NAMED))) == 1 + len(NAMED)


def test_tokenizer_model_without_the_package_says_what_to_install(
    model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"pip install 'nanovllm\[sentencepiece\]'"):
        Tokenizer.load(str(tmp_path))


def test_models_that_are_no_bpe_go_through_transformers(tmp_path: Path) -> None:
    model = train(model_type="unigram", vocab_size=700)
    (tmp_path / "tokenizer.model").write_bytes(model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert Tokenizer.load(str(tmp_path)).encode("Hello world") == reference.encode("Hello world")
