"""A vocabulary of 1000 byte-level tokens for the fake executor, and a grammar compiler with it."""

from functools import cache
from itertools import product
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from nanovllm.config import EngineConfig
from nanovllm.core.grammar import GrammarCompiler
from nanovllm.core.grammar_sandbox import GrammarSandbox
from nanovllm.core.kept_masks import FREE_LINE, Vocabulary
from tests.core.fake_executor import VOCAB_SIZE, FakeExecutor

EOS = "<eos>"


@cache
def tokenizer_json() -> str:
    """Id 0 is EOS, ids 1 to 256 are the bytes, the others pairs and triples of letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["".join(letters) for letters in product(ascii_lowercase, repeat=2)]
    words += ["".join(letters) for letters in product("abcde", repeat=3)]
    tokens = [EOS, *alphabet, *words][:VOCAB_SIZE]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    return tokenizer.to_str()


@cache
def decode(token_ids: tuple[int, ...]) -> str:
    """Without EOS."""
    return Tokenizer.from_str(tokenizer_json()).decode(token_ids)


def make_compiler(sandbox: GrammarSandbox | None = None) -> GrammarCompiler:
    """One of its own; its vocabulary is loaded with its first grammar."""
    executor = FakeExecutor(EngineConfig(), num_blocks=2, max_model_len=2)
    return GrammarCompiler(tokenizer_json, executor.start(), sandbox=sandbox)


def with_small_table(
    compiler: GrammarCompiler, *, num_kept: int, num_spare: int
) -> GrammarCompiler:
    """Whose masks soon take each other's lines."""
    compiler.load()
    whole = compiler.vocabulary
    compiler.vocabulary = Vocabulary(
        whole.spelling,
        whole.words[FREE_LINE].copy(),
        whole.special,
        num_lines=num_kept + num_spare,
        num_spare=num_spare,
    )
    return compiler
