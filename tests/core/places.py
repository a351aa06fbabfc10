"""Where outputs are in their grammars, for tests of masks that are kept by it."""

from collections.abc import Hashable

from nanovllm.core.grammar import GrammarCompiler, Matcher
from nanovllm.core.kept_masks import Context, KeptMasks, Node


class Place:
    """Where an output is, or would be after tokens that are taken. key: what its mask depends on.
    exact: what all that may follow depends on. None: it is not known."""

    def __init__(self, known: KeptMasks, at: tuple[Context, Node] | None) -> None:
        self._known = known
        self._at = at

    @property
    def _is_known(self) -> bool:
        return self._at is not None and self._at[1].key is not None

    @property
    def key(self) -> Hashable:
        return (self._at[0].key, self._at[1].key) if self._at and self._is_known else None

    @property
    def exact(self) -> Hashable:
        return self._at if self._is_known else None

    def take(self, token_id: int) -> None:
        self._at = None if self._at is None else self._known.walk(*self._at, token_id)


def place_of(matcher: Matcher) -> Place:
    """Where it is now; it may go on without."""
    node = matcher.node if matcher.state is None else matcher.state.node
    at = None if matcher.context is None else (matcher.context, node)
    return Place(matcher.family.known, at)


def unkept(matcher: Matcher) -> Matcher:
    """The same, which is not followed from here on: llguidance is asked at every step."""
    matcher.state = matcher.context = None
    return matcher


def kept_mask(matcher: Matcher, compiler: GrammarCompiler) -> bytes | None:
    """Of the state in which it is; None if it has still to be computed."""
    state = matcher.state
    if state is None or state.kept.line < 0:
        return None
    return compiler.vocabulary.words[state.kept.line].tobytes()
