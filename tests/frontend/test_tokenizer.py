"""Ids, text and chat prompts equal those of tokenizer.json, transformers and published facts."""

# ruff: noqa: RUF001 - odd characters are the point

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from nanovllm.checkpoint.gguf_tokenizer import build
from nanovllm.checkpoint.locate import locate
from nanovllm.frontend.detokenizer import DetokenizerFactory
from nanovllm.frontend.tokenizer import Tokenizer, _byte_of_char
from tests.checkpoint.gguf_writing import write_gguf
from tests.conftest import quick_gguf
from tests.frontend.vocabulary import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    NAMED,
    byte_tokenizer,
    fast_tokenizer,
    save,
    sentencepiece_tokenizer,
)

CORPUS = [
    "",
    "Hello world",
    "  two  spaces\t\ttabs\n\n\nnewlines   ",
    "def f(x):\n    return x**2 + 3.14159  # 2 spaces\n",
    "1234567890 12 3   4",
    "m² + ½ cup, ٣ items, Ⅷ, ①, 五",
    "日本語のテキスト 中文 한국어 ไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🇩🇪 😀😂 ❤️",
    "<|im_start|>user\nhi<|im_end|>\n <|endoftext|>x",
    "I'll don't we've THEY'RE it'S",
    "\u00a0nbsp \u2003em \u200bzwsp \ufeffbom",
    "e\u0301 é Å A\u030a",
    "\x00\x01\x7f",
    "a" * 300,
    "https://x.y/z?q=1&r=%20",
    "price: $1,234.56 (−7%)",
    "\r\n\r\n\t \n x",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀀",
]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 < 3 & 'x'?"},
    {"role": "assistant", "content": "True"},
    {"role": "user", "content": "Thanks ✓"},
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = [(32, 127), (0xA0, 0x600), (0x2000, 0x2200), (0x3000, 0xD000), (0x1F300, 0x1F700)]

    def character() -> str:
        return rng.choice(
            ["  ", " ", rng.choice("0123456789"), chr(rng.randrange(*rng.choice(ranges)))]
        )

    return ["".join(character() for _ in range(rng.randrange(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.load("smollm2")


@pytest.mark.model
def test_smollm2_equals_transformers_with_the_published_pre_tokenizer(smollm2: Tokenizer) -> None:
    import transformers

    path = locate("smollm2").path
    with quick_gguf():
        other = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers 5.23 knows no "smollm" split and lets digits join what stands before them.
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    for text in [*CORPUS, *random_texts(3000)]:
        ids = smollm2.encode(text)
        assert ids == other(text).input_ids, repr(text)
        assert smollm2.decode(ids, skip_special_tokens=False) == text
    assert smollm2.vocab_size == len(other)
    special = {i for i, token in other.added_tokens_decoder.items() if token.special}
    assert smollm2.special_ids == special
    assert (smollm2.bos_token_id, smollm2.eos_token_id) == (1, 2)
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[1:2]):
        expected = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert smollm2.apply_chat_template(messages) == expected


@pytest.mark.model
def test_smollm2_random_ids_stream_to_what_decoding_gives(smollm2: Tokenizer) -> None:
    factory = DetokenizerFactory(smollm2)
    rng = random.Random(1)
    for _ in range(500):
        ids = [rng.randrange(smollm2.vocab_size) for _ in range(30)]
        for skip in (True, False):
            one = factory.make(skip_special_tokens=skip)
            text = "".join(one.feed([token_id]) for token_id in ids) + one.flush()
            assert text == smollm2.decode(ids, skip_special_tokens=skip)


# ---- directories


def test_a_directory_with_a_tokenizer_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode("aé") == [97, *"é".encode()]
    assert tokenizer.decode([97, EOS, *"é".encode(), NAMED]) == "aé<named ⊕>"
    assert tokenizer.token_bytes(0xC3) == b"\xc3" and tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_bytes(NAMED) == "<named ⊕>".encode()
    assert tokenizer.token_text(EOS) == "<eos>" and tokenizer.token_text(0xC3) == "\ufffd"
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


def test_tokenizer_config_adds_bos_and_brings_a_template(tmp_path: Path) -> None:
    save(tmp_path)
    config = {
        "bos_token": {"content": "<bos>"},
        "eos_token": "<eos>",
        "add_bos_token": True,
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": CHAT_TEMPLATE},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_path(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert tokenizer.encode("a") == [BOS, 97]
    assert tokenizer.encode("a", add_special_tokens=False) == [97]
    prompt = tokenizer.apply_chat_template(MESSAGES[1:3])
    assert prompt == "user:What is 2 < 3 & 'x'?<eos>assistant:True|"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_path(tmp_path).apply_chat_template(MESSAGES) == "from the file"


def write_config(directory: Path, name: str = "tokenizer_config.json", **content: object) -> None:
    (directory / name).write_text(json.dumps(content))


def save_with_bos(directory: Path) -> None:
    """A tokenizer.json that puts BOS in front by itself."""
    fast = fast_tokenizer()
    fast.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=["<bos>", "$A"], special_tokens=[("<bos>", BOS)]),
        ]
    )
    fast.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [BOS, 97]),
        ({"bos_token": "<bos>", "add_eos_token": False}, [BOS, 97]),
        ({"eos_token": "<eos>", "add_eos_token": True}, [BOS, 97, EOS]),
        ({"bos_token": "<bos>", "add_bos_token": False}, [97]),
        ({"bos_token": "<bos>", "add_bos_token": None}, [BOS, 97]),
    ],
)
def test_bos_as_tokenizer_json_has_it_where_the_config_says_nothing(
    tmp_path: Path, config: dict[str, object], expected: list[int]
) -> None:
    save_with_bos(tmp_path)
    write_config(tmp_path, **config)
    assert Tokenizer.from_path(tmp_path).encode("a") == expected


def test_bos_of_the_post_processor_reaches_templates(tmp_path: Path) -> None:
    save_with_bos(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}hi")
    assert Tokenizer.from_path(tmp_path).apply_chat_template(MESSAGES) == "<bos>hi"
    write_config(tmp_path, bos_token=None)
    assert Tokenizer.from_path(tmp_path).apply_chat_template(MESSAGES) == "hi", "said to have none"


def test_a_post_processor_with_padding_saved_beside_it(tmp_path: Path) -> None:
    save_with_bos(tmp_path)
    fast = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.enable_padding(length=8)
    fast.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, eos_token="<eos>", add_eos_token=True)
    assert Tokenizer.from_path(tmp_path).encode("a") == [BOS, 97, EOS]


def test_special_tokens_map_is_read(tmp_path: Path) -> None:
    save(tmp_path)
    write_config(tmp_path, "special_tokens_map.json", bos_token={"content": "<bos>"}, eos_token="a")
    write_config(tmp_path, eos_token="<eos>", image_token="<img>")
    named = Tokenizer.from_path(tmp_path).special_tokens
    assert named == {"bos_token": "<bos>", "eos_token": "a", "image_token": "<img>"}
    # The map is older than a config that lists the added tokens, and does not overrule that.
    write_config(tmp_path, eos_token="<eos>", added_tokens_decoder={})
    named = Tokenizer.from_path(tmp_path).special_tokens
    assert named == {"bos_token": "<bos>", "eos_token": "<eos>"}


def test_named_tokens_of_the_vocabulary_are_special(tmp_path: Path) -> None:
    save(tmp_path)
    write_config(tmp_path, eos_token="~", pad_token="<nowhere>")
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.eos_token_id == ord("~") and ord("~") in tokenizer.special_ids
    assert tokenizer.decode([97, ord("~")]) == "a"


def test_a_token_that_is_to_be_added_and_does_not_exist_is_named(tmp_path: Path) -> None:
    save(tmp_path)
    write_config(tmp_path, bos_token="<nowhere>", add_bos_token=True)
    with pytest.raises(ValueError, match=r"'<nowhere>'.*not in the vocabulary.*tokenizer="):
        Tokenizer.from_path(tmp_path)


TEMPLATES = {"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "{{ documents }}"}


def with_templates(directory: Path, form: str, templates: dict[str, str]) -> Tokenizer:
    save(directory)
    if form == "config":
        entries = [{"name": name, "template": text} for name, text in templates.items()]
        write_config(directory, chat_template=entries)
    else:
        write_config(directory, chat_template="not this")
        (directory / "additional_chat_templates").mkdir()
        for name, text in templates.items():
            folder = "" if name == "default" else "additional_chat_templates"
            stem = "chat_template" if name == "default" else name
            (directory / folder / f"{stem}.jinja").write_text(text)
    return Tokenizer.from_path(directory)


@pytest.mark.parametrize("form", ["config", "files"])
def test_named_templates_are_chosen_as_transformers_does(tmp_path: Path, form: str) -> None:
    tokenizer = with_templates(tmp_path, form, TEMPLATES)
    assert tokenizer.chat_template == "plain" and tokenizer.tool_template == TEMPLATES["tool_use"]
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=None) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}, {}]) == "2 tools"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="rag", documents=[1]) == "[1]"
    with pytest.raises(ValueError, match=r"'other'.*default, rag, tool_use"):
        tokenizer.apply_chat_template(MESSAGES, chat_template="other")


def test_named_templates_without_a_default_are_listed(tmp_path: Path) -> None:
    tokenizer = with_templates(tmp_path, "config", {"rag": "x", "tool_use": "y"})
    assert tokenizer.has_chat_template and tokenizer.chat_template is None
    with pytest.raises(ValueError, match=r"'default'.*name one of rag, tool_use"):
        tokenizer.apply_chat_template(MESSAGES)


def test_gguf_templates_have_names_too(tmp_path: Path) -> None:
    prefix = "tokenizer.chat_template"
    facts = {f"{prefix}s": ["tool_use"], prefix: "plain", f"{prefix}.tool_use": "with tools"}
    tokenizer = Tokenizer.from_path(write_gguf(tmp_path / "t.gguf", facts=gguf_facts(**facts)))
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{}]) == "with tools"


def test_tools_and_documents_are_none_where_nobody_gives_them() -> None:
    source = "{{ tools is none and documents is none }} {{ tools is defined }}"
    assert Tokenizer(fast_tokenizer(), chat_template=source).apply_chat_template([]) == "True True"


def test_truncation_and_padding_saved_in_tokenizer_json_do_not_apply(tmp_path: Path) -> None:
    fast = fast_tokenizer()
    fast.enable_truncation(3)
    fast.enable_padding(length=8)
    fast.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_path(tmp_path).encode("hello")) == 5


def test_directories_without_a_usable_tokenizer_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer.*tokenizer="):
        Tokenizer.from_path(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_path(tmp_path)


# ---- GGUF


def gguf_facts(**facts: object) -> dict[str, Any]:
    alphabet = [chr(c) for c in range(0x100, 0x144)]  # not the whole, but ASCII letters are in it
    tokens = [*map(chr, range(33, 127)), "Ġ", "Ċ", "ab", "Ġab", "11", "<ctl>", "<think>", "word"]
    tokens += [c for c in alphabet if c not in tokens]
    types = [{"<ctl>": 3, "<think>": 4}.get(token, 1) for token in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["a b", "Ġ ab", "1 1"],
        "tokenizer.ggml.bos_token_id": tokens.index("<ctl>"),
        "tokenizer.ggml.eos_token_id": tokens.index("Ċ"),
        **facts,
    }


def texts(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_text(token_id) for token_id in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("default", ["ab", " ab", "11", "1", "<think>", "<ctl>"]),
        ("gpt-2", ["ab", " ab", "11", "1", "<think>", "<ctl>"]),
        ("smollm", ["ab", " ab", "1", "1", "1", "<think>", "<ctl>"]),
        ("qwen2", ["ab", " ab", "1", "1", "1", "<think>", "<ctl>"]),
        ("llama-bpe", ["<ctl>", "ab", " ab", "11", "1", "<think>", "<ctl>"]),
        ("tekken", ["<ctl>", "ab", " ab", "1", "1", "1", "<think>", "<ctl>"]),
    ],
)
def test_gguf_splits_as_the_file_names_it(tmp_path: Path, split: str, expected: list[str]) -> None:
    facts = gguf_facts(**{"tokenizer.ggml.pre": split})
    tokenizer = Tokenizer.from_path(write_gguf(tmp_path / "t.gguf", facts=facts))
    assert texts(tokenizer, "ab ab111<think><ctl>") == expected
    assert tokenizer.special_ids == {tokenizer.bos_token_id}
    whole = ["word"] if split in ("llama-bpe", "tekken") else list("word")
    assert texts(tokenizer, "word")[-len(whole) :] == whole, "ignore_merges"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("qwen2", "helloWorld|/n| DON|'T| |1|2|3|4| | //|a|\n|é你好|。b|-C"),
        ("command-r", "helloWorld|/|n| DON|'|T| |1|2|3|4| | //|a|\n|é你好|。|b|-|C"),
        ("phi-2", "helloWorld|/|n| DON|'|T| 1234| | //|a|\n|é你好|。|b|-|C"),
        ("glm4", "helloWorld|/n| DON|'T| |123|4| | //|a|\n|é你好|。b|-C"),
        ("gpt-4o", "hello|World|/n| DON'T| |123|4| | //|a|\n|é你好|。b|-C"),
        ("tekken", "hello|World|/n| DON|'T| |1|2|3|4| | //|a|\n|é你好|。b|-C"),
        ("deepseek-v3", "helloWorld|/n| DON|'T| |123|4| | //|a|\n|é|你好|。|b|-C"),
        ("deepseek-llm", "helloWorld|/|n| DON|'|T| |1234| | //|a|\n|é|你好|。|b|-|C"),
        ("seed-coder", "helloWorld|/n| DON|'T| |1|2|3|4| | //|a|\n|é你好|。b|-C"),
        ("bailingmoe", "helloWorld|/n| DON|'T| |1|2|3|4| | //|a|\n|é你好|。b|-C"),
        ("bloom", "helloWorld/n| DON'T| 1234| | //a|\n|é你好|。|b-C"),
        ("viking", "helloWorld/n| DON'T| |1|2|3|4| | //a|\n|é你好|。|b-C"),
        ("falcon", "helloWorld|/|n| DON|'|T| |123|4|  |//|a|\n|é你好|。|b|-|C"),
    ],
)
def test_where_gguf_cuts_a_text_before_merges(tmp_path: Path, split: str, expected: str) -> None:
    """Of each kind of pattern one; that all are as llama.cpp's is tested with that library."""
    fast = build(tmp_path, gguf_facts(**{"tokenizer.ggml.pre": split}))
    text = "helloWorld/n DON'T 1234  //a\né你好。b-C"
    assert fast.pre_tokenizer is not None
    pieces = [text[a:b] for _, (a, b) in fast.pre_tokenizer.pre_tokenize_str(text)]
    assert "|".join(pieces) == expected


def test_gguf_says_whether_bos_goes_in_front(tmp_path: Path) -> None:
    for number, wanted in enumerate((True, False)):
        facts = gguf_facts(
            **{"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": wanted}
        )
        tokenizer = Tokenizer.from_path(write_gguf(tmp_path / f"{number}.gguf", facts=facts))
        assert (tokenizer.encode("ab")[0] == tokenizer.bos_token_id) is wanted


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    facts = gguf_facts(**{"tokenizer.ggml.pre": "qwen2"})
    fast = build(tmp_path, facts)
    assert fast.normalizer is not None and fast.normalizer.normalize_str("e\u0301") == "é"


def test_gguf_tokenizers_nobody_can_build_say_what_to_do(tmp_path: Path) -> None:
    for number, (facts, complaint) in enumerate(
        [
            (gguf_facts(**{"tokenizer.ggml.pre": "martian"}), "martian.*known: default"),
            ({"tokenizer.ggml.model": None}, "holds no tokenizer"),
        ]
    ):
        path = write_gguf(tmp_path / f"{number}.gguf", facts=facts)
        with pytest.raises(ValueError, match=f"{complaint}.*tokenizer="):
            Tokenizer.from_path(path)


# ---- chat templates


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n{% if loop.index > 2 %}{% break %}{% endif %}\n  {{ m.role }}\n"
        "{% endfor %}",
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }} {{ strftime_now('%Y') }} {{ extra }} {{ undefined_name }}",
    ],
)
def test_templates_render_as_in_transformers(source: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = Tokenizer(fast_tokenizer(), chat_template=source)
    (theirs,), _ = render_jinja_template([MESSAGES], chat_template=source, extra="x")
    assert ours.apply_chat_template(MESSAGES, add_generation_prompt=False, extra="x") == theirs


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "does not compile"),
        ("{{ messages.append(1) }}", "not suit"),
        ("{{ ''.__class__.__mro__ }}", "not suit"),
        ("{{ messages[0].content + 1 }}", "not suit"),
    ],
)
def test_a_template_that_refuses_is_a_value_error(source: str, complaint: str) -> None:
    tokenizer = Tokenizer(fast_tokenizer(), chat_template=source)
    with pytest.raises(ValueError, match=complaint):
        tokenizer.apply_chat_template(MESSAGES)


def test_special_tokens_reach_the_template() -> None:
    assert byte_tokenizer().apply_chat_template(MESSAGES[:2]).count("<eos>") == 1


def test_the_alphabet_of_bytes_is_gpt_2s() -> None:
    alphabet = _byte_of_char()
    assert alphabet.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    for char in "!~¡¬®ÿAz09":
        assert alphabet[char] == ord(char), "printable ones stand for themselves"
    rest = [*range(33), *range(127, 161), 173]
    assert [alphabet[chr(256 + index)] for index in range(len(rest))] == rest


def with_added(**settings: bool) -> FastTokenizer:
    fast = fast_tokenizer()
    fast.add_tokens([AddedToken("<a token of 21 chars>", **settings)])
    return fast


def normalizing() -> FastTokenizer:
    fast = fast_tokenizer()
    fast.normalizer = normalizers.NFKD()
    return fast


@pytest.mark.parametrize(
    ("fast", "most_chars"),
    [
        (fast_tokenizer(), len("<named ⊕>")),
        (with_added(), 21),
        (with_added(lstrip=True), None),  # it takes any amount of white space with it
        (with_added(rstrip=True), None),
        (normalizing(), None),  # a character may become several, or none
        (FastTokenizer(models.WordLevel({"word": 0}, "word")), None),  # unknown words are a token
        (sentencepiece_tokenizer()._fast, len("<0x00>")),
    ],
)
def test_how_much_text_one_token_can_stand_for(fast: FastTokenizer, most_chars: int | None) -> None:
    assert Tokenizer(fast).most_chars == most_chars
