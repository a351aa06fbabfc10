"""Text as it comes: no half characters, nothing taken back, equal to decoding all at once."""

import random

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models
from tokenizers.decoders import DecodeStream

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


def test_sentencepiece_does_not_wait_for_ill_formed_bytes() -> None:
    one = detokenizer(sentencepiece_tokenizer())
    assert [one.feed([9 + 0xFF]) for _ in range(10)] == ["\ufffd"] * 10


# ---- after a prompt


def by_decode_stream(
    tokenizer: Tokenizer, prompt: list[int], token_ids: list[int], *, skip: bool
) -> str | None:
    """The text of `tokenizers`' own stream; None where it gives up (DecodeStreamError)."""
    fast = FastTokenizer.from_str(tokenizer.to_json())
    stream = DecodeStream(ids=prompt, skip_special_tokens=skip)
    try:
        return "".join(stream.step(fast, token_id) or "" for token_id in token_ids)
    except Exception as error:
        assert "Invalid prefix" in str(error)
        return None


def random_ids(rng: random.Random, vocab_size: int) -> list[int]:
    """Words, special tokens, bytes that are characters and bytes that are none."""
    euro, replacement = ([9 + byte for byte in text.encode()] for text in "€\ufffd")
    choices = [[rng.randrange(9)], [rng.randrange(9)], euro, [9 + 0x80], [9 + 0xE2], euro[:2]]
    choices += [[vocab_size - 1], [9 + 65], replacement, [1]]
    return [token_id for _ in range(rng.randrange(1, 8)) for token_id in rng.choice(choices)]


@pytest.mark.parametrize("skip", [True, False])
def test_sentencepiece_after_a_prompt_equals_decode_stream(skip: bool) -> None:
    tokenizer = sentencepiece_tokenizer()
    num_compared = 0
    for seed in range(3000):
        rng = random.Random(seed)
        prompt = random_ids(rng, tokenizer.vocab_size)
        if tokenizer.decode(prompt, skip_special_tokens=skip).endswith("\ufffd"):
            continue  # the stream repeats the whole prompt then
        ids = [*random_ids(rng, tokenizer.vocab_size), 6]  # "!": nothing is left open
        expected = by_decode_stream(tokenizer, prompt, ids, skip=skip)
        if expected is not None:
            num_compared += 1
            one = DetokenizerFactory(tokenizer).make(prompt, skip_special_tokens=skip)
            assert "".join(pieces(one, ids, rng)) == expected, (seed, prompt, ids)
    assert num_compared > 1000


def test_bytes_after_a_prompt_equal_decode_stream() -> None:
    tokenizer = byte_tokenizer()
    for seed in range(1000):
        rng = random.Random(seed)
        prompt, ids = (
            [
                token_id
                for _ in range(5)
                for token_id in rng.choice([[BOS], [65], list("世".encode())])
            ]
            for _ in range(2)
        )
        expected = by_decode_stream(tokenizer, prompt, ids, skip=True)
        one = DetokenizerFactory(tokenizer).make(prompt, skip_special_tokens=True)
        assert "".join(pieces(one, ids, rng)) == expected


def test_other_vocabularies_after_a_prompt_equal_decode_stream() -> None:
    vocab = {"▁the": 0, "▁fox": 1, "es": 2, "▁": 3, "\ufffd": 4, "<s>": 5}
    fast = FastTokenizer(models.WordLevel(vocab, unk_token="<s>"))
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(fast)
    for seed in range(500):
        rng = random.Random(seed)
        prompt, ids = ([rng.randrange(6) for _ in range(rng.randrange(1, 9))] for _ in range(2))
        if tokenizer.decode(prompt).endswith("\ufffd"):
            continue  # the stream repeats the whole prompt then
        expected = by_decode_stream(tokenizer, prompt, [*ids, 2], skip=True)
        one = DetokenizerFactory(tokenizer).make(prompt, skip_special_tokens=True)
        assert "".join(pieces(one, [*ids, 2], rng)) == expected, (prompt, ids)


def test_a_completion_keeps_its_first_space() -> None:
    tokenizer = sentencepiece_tokenizer()
    special = tokenizer.vocab_size - 1

    def first_word(prompt: list[int], *, skip: bool = True) -> str:
        return DetokenizerFactory(tokenizer).make(prompt, skip_special_tokens=skip).feed([4, 5])

    assert first_word([special, 2, 3]) == " world"
    assert first_word([special]) == "world", "nothing stands before it"
    assert first_word([special], skip=False) == " world", "the special token's text does"
    assert first_word([2, 3, special]) == " world"


def test_a_stop_string_with_a_space_is_found_in_the_first_word() -> None:
    one = DetokenizerFactory(sentencepiece_tokenizer()).make([2, 3], skip_special_tokens=True)
    stops = StopStrings([" world"], include_in_output=False)
    assert stops.feed(one.feed([4])) == ("", None)
    assert stops.feed(one.feed([5])) == ("", " world")


def test_a_prompt_that_ends_within_a_character_is_gone_on_with() -> None:
    euro = list("€".encode())
    one = DetokenizerFactory(byte_tokenizer()).make([65, *euro[:2]], skip_special_tokens=True)
    assert one.feed(euro[2:]) == "€"
    pieces = DetokenizerFactory(sentencepiece_tokenizer())
    two = pieces.make([2, *(9 + byte for byte in euro[:2])], skip_special_tokens=True)
    assert two.feed([9 + euro[2]]) == "€"


def test_a_replacement_character_before_bytes_stays_itself() -> None:
    tokens = ["\ufffd", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    euro = [1 + byte for byte in "€".encode()]
    for count in range(6):
        one = detokenizer(Tokenizer(fast))
        found = [one.feed([token_id]) for token_id in [*[0] * count, *euro]]
        assert "".join(found) == "\ufffd" * count + "€"


def test_a_piece_alone_is_what_it_adds() -> None:
    tokenizer = sentencepiece_tokenizer()
    assert [tokenizer.token_text(i) for i in (2, 3, 9 + 10)] == [" he", "llo", "\n"]
    assert [tokenizer.token_bytes(i) for i in (2, 9 + 0xE2)] == [b" he", b"\xe2"]


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


def test_a_stop_string_that_does_not_count_yet_is_given_out_at_once() -> None:
    stops = StopStrings(["ab", "xxxx"], include_in_output=False)
    assert stops.feed("1ab", look=False) == ("1ab", None)
    assert stops.feed("2xab", look=False) == ("2xab", None)
    assert stops.feed("x") == ("", None)
    assert stops.feed("y3ab") == ("xy3", "ab")


def test_what_came_too_early_is_not_found_within_what_is_held_back() -> None:
    stops = StopStrings(["ab", "xabyz"], include_in_output=False)
    assert stops.feed("xab", look=False) == ("", None), "it may become the longer one"
    assert stops.feed("q") == ("xabq", None)
    assert stops.feed("ab") == ("", "ab")
