"""A small byte-level tokenizer for tests: the id of a byte is the byte; 256 is EOS, 257 BOS."""

from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from nanovllm.frontend.tokenizer import BYTE_OF_CHAR, Tokenizer

EOS, BOS, NAMED = 256, 257, 258
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ eos_token if loop.index0 else '' }}{{ m.role }}:{{ m.content }}"
    "{% endfor %}{% if add_generation_prompt %}|{% endif %}"
)
SPECIAL_TOKENS = {"eos_token": "<eos>", "bos_token": "<bos>"}


def fast_tokenizer() -> FastTokenizer:
    fast = FastTokenizer(models.BPE(vocab=dict(BYTE_OF_CHAR), merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<eos>"), AddedToken("<bos>")])
    fast.add_tokens([AddedToken("<named ⊕>")])
    return fast


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(fast_tokenizer(), special_tokens=SPECIAL_TOKENS, chat_template=CHAT_TEMPLATE)


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: words begin with ▁, other characters are byte tokens, a leading space goes."""
    tokens = ["<unk>", "▁", "▁he", "llo", "▁wor", "ld", "!", "é", "▁x"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast.add_special_tokens([AddedToken("<s>")])
    return Tokenizer(fast)


def save(directory: Path) -> None:
    fast_tokenizer().save(str(directory / "tokenizer.json"))
