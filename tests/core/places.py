"""Where outputs are in their grammars, for tests of masks that are kept by it."""

from nanovllm.core.grammar import GrammarCompiler, Matcher
from nanovllm.core.kept_masks import Place


def place_of(matcher: Matcher) -> Place:
    """Where it is, which it may share with others."""
    place = matcher.place if matcher.state is None else matcher.state.place
    assert place is not None
    return place


def unkept(matcher: Matcher) -> Matcher:
    """The same, which is not followed from here on: llguidance is asked at every step."""
    matcher.state = matcher.place = None
    return matcher


def kept_mask(matcher: Matcher, compiler: GrammarCompiler) -> bytes | None:
    """Of the state in which it is; None if it has still to be computed."""
    state = matcher.state
    if state is None or state.kept.line < 0:
        return None
    return compiler.vocabulary.words[state.kept.line].tobytes()
