"""A fast tokenizer from the pieces and scores of a SentencePiece BPE vocabulary.

Called for GGUF files of kind "llama" and for `tokenizer.model` files. Both keep no merges: two
neighbours merge if together they are a piece, the piece with the highest score first. The ids are
llama.cpp's, whose `llm_tokenizer_spm` is the reference.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as FastTokenizer

from nanovllm.checkpoint.special_tokens import TokenKind

SPACE = "▁"


def build(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    adds_space_prefix: bool,
) -> FastTokenizer:
    """The tokenizer, without a post-processor.

    adds_space_prefix: a space goes before the text and before what follows a special token, so
    that the first word is spelled like every other. A space that is there already stays.
    """
    unknown = next(
        (p for p, kind in zip(pieces, kinds, strict=True) if kind == TokenKind.UNKNOWN), None
    )
    tokenizer = FastTokenizer(
        models.BPE(
            vocab={piece: token_id for token_id, piece in enumerate(pieces)},
            merges=merges(pieces, scores, kinds),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if adds_space_prefix:
        steps.insert(0, normalizers.Prepend(SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(decoding)
    add_tokens(tokenizer, pieces, kinds)
    return tokenizer


def from_model_file(path: Path) -> tuple[FastTokenizer, dict[str, str]] | None:
    """The tokenizer of a `tokenizer.model` file, and its special tokens ("bos_token", …). Prompts
    begin with BOS, as Llama's do.

    None if the file is none of SentencePiece's BPE models, or one that normalizes texts first.
    Raises `ValueError` naming the package it takes to read it.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(
            f"{path} takes the package {error.name} to be read: "
            "pip install 'nanovllm[sentencepiece]', or put a tokenizer.json beside it"
        ) from None
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined] # made at import
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return None  # some models' file of this name is in tiktoken's format
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    is_plain = not (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces)
    if trainer.model_type != trainer.BPE or not is_plain:
        return None
    tokenizer = build(
        [piece.piece for piece in model.pieces],
        [piece.score for piece in model.pieces],
        [piece.type for piece in model.pieces],
        adds_space_prefix=normalizer.add_dummy_prefix,
    )
    wanted = {
        "bos_token": trainer.bos_piece,
        "eos_token": trainer.eos_piece,
        "unk_token": trainer.unk_piece,
    }
    found = {name: text for name, text in wanted.items() if tokenizer.token_to_id(text) is not None}
    if bos := found.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer, found


def add_tokens(tokenizer: FastTokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Tell `tokenizer` which of its tokens are found in a text before anything else is."""
    special, plain = [], []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (TokenKind.CONTROL, TokenKind.UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == TokenKind.USER_DEFINED:
            plain.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def merges(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, in the order in which they are to be tried.

    Where two ways lead to the same piece SentencePiece takes the one further left; in a run of one
    character that is the one whose left part is longer, as runs are joined from the left.
    """
    parts = {p for p, kind in zip(pieces, kinds, strict=True) if kind != TokenKind.BYTE}
    found: list[tuple[float, int, str, str]] = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in parts and right in parts:
                found.append((-score, -cut, left, right))
    found.sort(key=lambda way: way[:2])
    return [(left, right) for _, _, left, right in found]
