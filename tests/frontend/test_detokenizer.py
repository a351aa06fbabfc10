"""Text as it comes: no half characters, nothing taken back, equal to decoding all at once."""

import random

import pytest

from nanovllm.frontend.detokenizer import Detokenizer, DetokenizerFactory, StopStrings
from nanovllm.frontend.tokenizer import Tokenizer
from tests.frontend.vocabulary import BOS, EOS, NAMED, byte_tokenizer, sentencepiece_tokenizer

TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve ﷽ \t\n ½"


def detokenizer(tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> Detokenizer:
    return DetokenizerFactory(tokenizer).make(skip_special_tokens=skip_special_tokens)


def pieces(detokenizer: Detokenizer, token_ids: list[int], rng: random.Random) -> list[str]:
    """Feed in random chunks."""
    found = []
    while token_ids:
        size = rng.choice([1, 1, 1, 2, 5])
        found.append(detokenizer.feed(token_ids[:size]))
        token_ids = token_ids[size:]
    return [*found, detokenizer.flush()]


@pytest.mark.parametrize("skip", [True, False])
def test_any_ids_join_to_what_decoding_at_once_gives(skip: bool) -> None:
    tokenizer = byte_tokenizer()
    for seed in range(2000):
        rng = random.Random(seed)
        ids = [rng.randrange(300) for _ in range(rng.randrange(12))]
        ids += rng.choice([[], [0xE4, 0xB8], list("世界".encode()), [0xF0, 0x9F, 0x91, 0xA9]])
        ids += [rng.choice([0x80, 0xC3, 0xE2, 0xF4, 0xFF, 65, EOS, NAMED]) for _ in range(4)]
        text = "".join(pieces(detokenizer(tokenizer, skip_special_tokens=skip), ids, rng))
        assert text == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_a_character_comes_out_whole_and_at_once() -> None:
    one = detokenizer(byte_tokenizer())
    assert [one.feed([byte]) for byte in "é世👩".encode()] == [
        "",
        "é",
        "",
        "",
        "世",
        "",
        "",
        "",
        "👩",
    ]


def test_an_unfinished_character_becomes_a_replacement_at_the_end() -> None:
    one = detokenizer(byte_tokenizer())
    assert (one.feed([65, 0xE4, 0xB8]), one.flush(), one.flush()) == ("A", "\ufffd", "")


def test_special_tokens_show_only_if_asked_for() -> None:
    tokenizer = byte_tokenizer()
    ids = [BOS, 65, NAMED, 66, EOS]
    assert detokenizer(tokenizer).feed(ids) == "A<named ⊕>B"
    shown = detokenizer(tokenizer, skip_special_tokens=False)
    assert shown.feed(ids) == "<bos>A<named ⊕>B<eos>"


def test_sentencepiece_keeps_spaces_and_joins_byte_tokens() -> None:
    tokenizer = sentencepiece_tokenizer()
    euro = [9 + byte for byte in "€".encode()]
    special = tokenizer.vocab_size - 1
    for ids in (
        [2, 3, 4, 5, 6],
        [special, 2, 3, *euro, 8, special, 8],
        [1, 2, 1, 1, 8],
        [*euro, *euro, 7, *euro],
        [2, *euro, 3, 8, 7],
    ):
        for seed in range(20):
            found = pieces(detokenizer(tokenizer), ids, random.Random(seed))
            assert "".join(found) == tokenizer.decode(ids)
            assert not any("\ufffd" in piece for piece in found)


def test_sentencepiece_does_not_wait_for_ever_for_ill_formed_bytes() -> None:
    one = detokenizer(sentencepiece_tokenizer())
    found = [one.feed([9 + 0xFF]) for _ in range(10)]
    assert found[3] == "\ufffd" * 4 and found[7] == "\ufffd" * 4


# ---- stop strings


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the first end wins, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def feed(stops: StopStrings, chunks: list[str]) -> tuple[str, str | None]:
    text = ""
    for chunk in chunks:
        piece, stop = stops.feed(chunk)
        text += piece
        if stop is not None:
            return text, stop
    return text + stops.flush(), None


@pytest.mark.parametrize("include", [True, False])
def test_the_cut_does_not_depend_on_how_text_comes(include: bool) -> None:
    for seed in range(3000):
        rng = random.Random(seed)
        words = [
            "".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))
        ]
        text = "".join(rng.choices("abc", weights=[4, 4, 1], k=15))
        cuts = sorted(rng.sample(range(1, 15), k=rng.randrange(14)))
        chunks = [text[i:j] for i, j in zip([0, *cuts], [*cuts, 15], strict=True)]
        found = feed(StopStrings(words, include_in_output=include), chunks)
        assert found == reference(text, words, include), (words, chunks)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nUser:", "END"], include_in_output=False)
    fed = ["Hello", " wor", "ld\n", "\nUs", "ual", " EN", "DED"]
    given = [stops.feed(text) for text in fed]
    assert given == [
        ("Hello", None),
        (" wor", None),
        ("ld", None),
        ("", None),
        ("\n\nUsual", None),
        (" ", None),
        ("", "END"),
    ]


def test_before_min_tokens_a_stop_string_is_plain_text() -> None:
    stops = StopStrings(["ab"], include_in_output=False)
    assert stops.feed("xab", look=False) == ("xab", None)
    assert stops.feed("a", look=False) == ("", None)
    assert stops.feed("by") == ("", "ab"), "it ends in text that counts"
