"""Log-probabilities in the two shapes of OpenAI's API, and in vLLM's for prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from nanovllm.frontend.detokenizer import Detokenizer, DetokenizerFactory
from nanovllm.frontend.outputs import Logprob, RequestOutput, TokenAlternatives
from nanovllm.frontend.server.replies import (
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
)
from nanovllm.frontend.tokenizer import Tokenizer

encode = msgspec.json.Encoder().encode
IMPOSSIBLE = -9999.0  # JSON has no -inf; OpenAI's word for a token that cannot be


class TokenNames:
    """How tokens are written: their text, or "token_id:123" (return_tokens_as_token_ids).

    It remembers how, so there is one for all requests.
    """

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool) -> None:
        self.tokenizer = tokenizer
        self.as_ids = as_ids
        self._encoded: dict[int, bytes] = {}  # by id, around its log-probability

    def text_offsets(
        self, start: int, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> "TextOffsets":
        """Of a completion of that prompt, whose text begins at `start`."""
        if self.tokenizer is None:
            return TextOffsets(None, start)
        make = DetokenizerFactory(self.tokenizer).make
        return TextOffsets(make(prompt_token_ids, skip_special_tokens=skip_special_tokens), start)

    def text(self, token_id: int, decoded: str | None) -> str:
        return f"token_id:{token_id}" if self.as_ids or decoded is None else decoded

    def byte_values(self, token_id: int, entry: Logprob) -> list[int] | None:
        """Also where the token is not a whole character."""
        if self.tokenizer is not None and self.tokenizer.spells_bytes:
            return list(self.tokenizer.token_bytes(token_id))
        return None if entry.decoded_token is None else list(entry.decoded_token.encode())

    def encoded(self, alternatives: TokenAlternatives) -> list[bytes]:
        """Each as the JSON of a `TopLogprob`, but for the closing brace."""
        found, remembered = [], self._encoded
        for token_id, entry in alternatives.items():
            around = remembered.get(token_id)
            if around is None:
                text = encode(self.text(token_id, entry.decoded_token)).replace(b"%", b"%%")
                spelled = encode(self.byte_values(token_id, entry))
                around = b'{"token":%b,"logprob":%%r,"bytes":%b' % (text, spelled)
                remembered[token_id] = around
            logprob = entry.logprob
            found.append(around % (logprob if logprob > IMPOSSIBLE else IMPOSSIBLE))
        return found


def chat_logprobs(tokens: Sequence[TokenAlternatives], num_top: int, names: TokenNames) -> bytes:
    """An entry per token with its `num_top` likeliest alternatives, -1 being all: a list of
    `TokenLogprob` as JSON. A stream may bring thousands a second."""
    content = []
    for alternatives in tokens:
        entries, rank = names.encoded(alternatives), next(iter(alternatives.values())).rank
        own, *likeliest = entries
        likeliest.insert(rank - 1, own)  # the token itself is among them by its rank alone
        if num_top >= 0:
            del likeliest[num_top:]
        top = b"},".join(likeliest)
        content.append(b'%b,"top_logprobs":[%b%b]}' % (own, top, b"}" if top else b""))
    return b"[%b]" % b",".join(content)


class TextOffsets:
    """Where in the text of one completion its tokens begin. Several may begin at one place, where a
    character is split over tokens, or a token is none of the text.

    start: of the first one; after a prompt that is shown, its length.
    """

    def __init__(self, detokenizer: Detokenizer | None, start: int) -> None:
        self._detokenizer = detokenizer
        self._end = start
        self._held: list[TokenEntry] = []

    def entries(
        self, token_ids: Sequence[int], tokens: Sequence[TokenAlternatives]
    ) -> list["TokenEntry"]:
        """What to show of these, the next ones."""
        made: list[TokenEntry] = []
        for token_id, alternatives in zip(token_ids, tokens, strict=True):
            made.append(TokenEntry(token_id, alternatives, self._end))
            if self._detokenizer is not None:
                self._end += len(self._detokenizer.feed((token_id,)))
        return made

    def shown(self, new: list["TokenEntry"], text_end: int, *, last: bool) -> list["TokenEntry"]:
        """Those that begin within the text shown so far; the others wait for it. A stop string has
        cut off the text of what still waits at the last."""
        found = self._held + new
        if last:
            return [one._replace(offset=min(one.offset, text_end)) for one in found]
        count = sum(one.offset <= text_end for one in found)
        self._held = found[count:]
        return found[:count]


class TokenEntry(NamedTuple):
    """A token and what else was likely; None for a prompt's first token. offset: in the text."""

    token_id: int
    alternatives: TokenAlternatives | None
    offset: int


def prompt_entries(
    output: RequestOutput, text: str, tokenizer: Tokenizer | None
) -> list[TokenEntry]:
    """Of the prompt's tokens, in its text as it was given, without a BOS that was added to it."""
    assert output.prompt_logprobs is not None
    token_ids, end, detokenizer = output.prompt_token_ids, 0, None
    if tokenizer is not None:
        whole = tokenizer.decode(token_ids, skip_special_tokens=False)
        end = len(text) - len(whole) if whole.endswith(text) else 0
        detokenizer = DetokenizerFactory(tokenizer).make(skip_special_tokens=False)
    entries: list[TokenEntry] = []
    for token_id, alternatives in zip(token_ids, output.prompt_logprobs, strict=True):
        entries.append(TokenEntry(token_id, alternatives, min(max(end, 0), len(text))))
        end += 0 if detokenizer is None else len(detokenizer.feed((token_id,)))
    return entries


def completion_logprobs(entries: Sequence[TokenEntry], names: TokenNames) -> CompletionLogprobs:
    """One entry per token."""
    found = CompletionLogprobs([], [], [], [])
    for token_id, alternatives, offset in entries:
        if alternatives is None:
            text = None if names.tokenizer is None else names.tokenizer.token_text(token_id)
            logprob = top = None
        else:
            text, logprob = alternatives[token_id].decoded_token, alternatives[token_id].logprob
            top = {
                names.text(i, one.decoded_token): finite(one.logprob)
                for i, one in alternatives.items()
            }
        found.text_offset.append(offset)
        found.tokens.append(names.text(token_id, text))
        found.token_logprobs.append(None if logprob is None else finite(logprob))
        found.top_logprobs.append(top)
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
