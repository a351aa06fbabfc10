"""Log-probabilities in the two shapes of OpenAI's API, and in vLLM's for prompts."""

from collections.abc import Sequence
from typing import NamedTuple

from nanovllm.frontend.outputs import Logprob, TokenAlternatives
from nanovllm.frontend.server.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from nanovllm.frontend.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # JSON has no -inf; OpenAI's word for a token that cannot be


class TokenNames(NamedTuple):
    """How tokens are written: their text, or "token_id:123" (return_tokens_as_token_ids)."""

    tokenizer: Tokenizer | None
    as_ids: bool

    def text(self, token_id: int, entry: Logprob) -> str:
        if self.as_ids or entry.decoded_token is None:
            return f"token_id:{token_id}"
        return entry.decoded_token

    def bytes(self, token_id: int, entry: Logprob) -> list[int] | None:
        """Also where the token is not a whole character."""
        if self.tokenizer is not None and self.tokenizer.spells_bytes:
            return list(self.tokenizer.token_bytes(token_id))
        return None if entry.decoded_token is None else list(entry.decoded_token.encode())


def chat_logprobs(
    tokens: Sequence[TokenAlternatives], num_top: int, names: TokenNames
) -> ChatLogprobs:
    """One entry per token, with its `num_top` likeliest alternatives."""
    content = []
    for alternatives in tokens:
        token_id, entry = next(iter(alternatives.items()))
        top = [
            TopLogprob(names.text(i, one), finite(one.logprob), names.bytes(i, one))
            for i, one in _likeliest(alternatives, num_top)
        ]
        text, code = names.text(token_id, entry), names.bytes(token_id, entry)
        content.append(TokenLogprob(text, finite(entry.logprob), code, top))
    return ChatLogprobs(content)


def completion_logprobs(
    tokens: Sequence[TokenAlternatives | None],
    token_ids: Sequence[int],
    names: TokenNames,
    *,
    offset: int,
) -> CompletionLogprobs:
    """offset: in the text, of the first token. None is a prompt's first token."""
    found = CompletionLogprobs([], [], [], [])
    for token_id, alternatives in zip(token_ids, tokens, strict=True):
        if alternatives is None:
            text = "" if names.tokenizer is None else names.tokenizer.token_text(token_id)
            entry, top = Logprob(0.0, 1, text), None
        else:
            entry = alternatives[token_id]
            top = {names.text(i, one): finite(one.logprob) for i, one in alternatives.items()}
        found.text_offset.append(offset)
        found.tokens.append(names.text(token_id, entry))
        found.token_logprobs.append(None if alternatives is None else finite(entry.logprob))
        found.top_logprobs.append(top)
        offset += len(entry.decoded_token or "")
    return found


def prompt_logprobs(tokens: Sequence[TokenAlternatives | None]) -> PromptLogprobs:
    return [
        None
        if alternatives is None
        else {
            str(i): PromptLogprob(finite(one.logprob), one.rank, one.decoded_token)
            for i, one in alternatives.items()
        }
        for alternatives in tokens
    ]


def finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)


def _likeliest(alternatives: TokenAlternatives, num_top: int) -> list[tuple[int, Logprob]]:
    """The token itself is among them only by its rank. -1 is all of them."""
    ranked = sorted(alternatives.items(), key=lambda item: item[1].rank)
    return ranked if num_top < 0 else ranked[:num_top]
