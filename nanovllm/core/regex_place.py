"""Where an output is in its regular expression: `json_place` for requests with `regex`.

`term_of` reads expressions of an everyday kind: characters of ASCII, classes, groups, alternatives,
counts. `RegexMasks` takes Brzozowski's derivative by each character: what remains to be matched.
Places are equal where that is, and counts farther away than a token reaches make no difference.
"""

import re
from collections.abc import Iterator
from typing import Any, Final

from nanovllm.core.kept_masks import KeptMasks, Node, Vocabulary

# A term is what remains: ("class", bits), ("seq", terms), ("or", terms) or ("times", term, m, n).
Term = tuple[Any, ...]
NOTHING: Final[Term] = ("seq", ())  # is left to be matched
MAX_CHARS = 200  # of an expression
MAX_TERMS = 16  # alternatives at one place
MAX_SIZE = 400  # of what remains at one place: terms in terms
MAX_STEPS = 200_000  # derivatives of one expression
ASCII = (1 << 128) - 1
ANY_BUT_NEWLINE = ASCII & ~(1 << ord("\n"))


class _NoTermError(Exception):
    """Not of the everyday kind."""


def _bits(characters: str) -> int:
    return sum({1 << ord(one) for one in characters})


DIGITS = _bits("0123456789")
WORD = DIGITS | _bits("".join(chr(a + i) for a in (65, 97) for i in range(26)) + "_")
SPACE = _bits(" \t\n\r\f\v")
ESCAPES = {"d": DIGITS, "w": WORD, "s": SPACE, "n": _bits("\n"), "t": _bits("\t"), "r": _bits("\r")}
COUNT = re.compile(r"\{(\d{1,5})(,?)(\d{0,5})\}")


def term_of(pattern: str) -> Term | None:
    """None if it is not of the everyday kind."""
    if len(pattern) > MAX_CHARS or not pattern.isascii():
        return None
    reader = _Reader(pattern)
    try:
        term = reader.alternatives(depth=0)
    except (_NoTermError, IndexError):
        return None
    return term if reader.at == len(pattern) else None


class _Reader:
    """Recursive descent. An `IndexError` is an early end."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.at = 0

    @property
    def _rest(self) -> str:
        return self._pattern[self.at :]

    def _next(self) -> str:
        self.at += 1
        return self._pattern[self.at - 1]

    def alternatives(self, depth: int) -> Term:
        if depth > 8:
            raise _NoTermError
        found = [self._sequence(depth)]
        while self._rest.startswith("|"):
            self.at += 1
            found.append(self._sequence(depth))
        return _or(*found)

    def _sequence(self, depth: int) -> Term:
        found = NOTHING
        while self._rest and self._rest[0] not in "|)":
            found = _seq(found, self._repeated(self._atom(depth)))
        return found

    def _repeated(self, term: Term) -> Term:
        counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        bounds: tuple[int, int | None] | None = counts.get(self._rest[:1])
        length = 1
        if (match := COUNT.match(self._rest)) is not None:
            least, comma, most = match.groups()
            length, bounds = match.end(), (int(least), int(least))
            if comma:
                bounds = (int(least), int(most) if most else None)
        elif self._rest.startswith("{"):
            raise _NoTermError
        if bounds is None:
            return term
        self.at += length
        if (self._rest[:1] in ("?", "+", "*", "{") and self._rest) or _may_end(term):
            raise _NoTermError  # lazy, possessive or twice; or of nothing
        return _times(term, *bounds)

    def _atom(self, depth: int) -> Term:
        match self._next():
            case "(":
                if self._rest.startswith("?"):
                    if not self._rest.startswith("?:"):
                        raise _NoTermError
                    self.at += 2
                term = self.alternatives(depth + 1)
                if self._next() != ")":
                    raise _NoTermError
                return term
            case "[":
                return ("class", self._class())
            case ".":
                return ("class", ANY_BUT_NEWLINE)
            case "\\":
                return ("class", self._escape())
            case "^" | "$" | "*" | "+" | "?" | "{" | "}" | "]":
                raise _NoTermError
            case plain:
                return ("class", _bits(plain))

    def _escape(self) -> int:
        one = self._next()
        if one in ESCAPES:
            return ESCAPES[one]
        if one.isalnum():
            raise _NoTermError
        return _bits(one)

    def _class(self) -> int:
        negated = self._rest.startswith("^")
        self.at += negated
        bits = 0
        while (one := self._next()) != "]":
            if one in "[&~^" or (one == "-" and not self._rest.startswith("]")):
                raise _NoTermError  # sets of sets
            low = self._escape() if one == "\\" else _bits(one)
            if self._rest.startswith("-") and not self._rest.startswith("-]"):
                self.at += 1
                high = self._next()
                high_bits = self._escape() if high == "\\" else _bits(high)
                if low.bit_count() != 1 or high_bits.bit_count() != 1 or high_bits < low:
                    raise _NoTermError
                low = 2 * high_bits - low
            bits |= low
        if not bits:
            raise _NoTermError
        return ASCII & ~bits if negated else bits


def _seq(first: Term, second: Term) -> Term:
    parts = tuple(
        part for one in (first, second) for part in (one[1] if one[0] == "seq" else (one,))
    )
    return parts[0] if len(parts) == 1 else ("seq", parts)


def _or(*terms: Term) -> Term:
    parts = frozenset(part for one in terms for part in (one[1] if one[0] == "or" else (one,)))
    if len(parts) > MAX_TERMS:
        raise _NoTermError
    return next(iter(parts)) if len(parts) == 1 else ("or", parts)


def _times(term: Term, least: int, most: int | None) -> Term:
    return NOTHING if most == 0 else ("times", term, least, most)


def _may_end(term: Term) -> bool:
    match term:
        case ("seq", parts):
            return all(map(_may_end, parts))
        case ("or", parts):
            return any(map(_may_end, parts))
        case ("times", _, least, _):
            return bool(least == 0)
    return False


def _derivative(term: Term, byte: int) -> Term | None:
    """What remains behind this character; None if it does not fit."""
    match term:
        case ("class", bits):
            return NOTHING if bits >> byte & 1 else None
        case ("times", inner, least, most):
            begun = _derivative(inner, byte)
            left = _times(inner, max(least - 1, 0), None if most is None else most - 1)
            return None if begun is None else _seq(begun, left)
        case ("or", parts):
            found = [one for part in parts if (one := _derivative(part, byte)) is not None]
            return _or(*found) if found else None
    found = []
    for index, part in enumerate(term[1]):
        begun = _derivative(part, byte)
        if begun is not None:
            found.append(_seq(begun, ("seq", term[1][index + 1 :])))
        if not _may_end(part):
            break
    return _or(*found) if found else None


def _size(term: Term) -> int:
    match term:
        case ("times", inner, _, _):
            return 1 + _size(inner)
        case ("seq", parts) | ("or", parts):
            return 1 + sum(map(_size, parts))
    return 1


def _classes(term: Term) -> Iterator[int]:
    """In which its characters are."""
    match term:
        case ("class", bits):
            yield bits
        case ("times", inner, _, _):
            yield from _classes(inner)
        case ("seq", parts) | ("or", parts):
            for part in parts:
                yield from _classes(part)


def _clipped(term: Term, far: int) -> Term:
    """With counts only up to `far`."""
    match term:
        case ("times", inner, least, most):
            most = far if most is None else min(most, far)
            return ("times", _clipped(inner, far), min(least, far), most)
        case ("seq", parts):
            return ("seq", tuple(_clipped(part, far) for part in parts))
        case ("or", parts):
            return ("or", frozenset(_clipped(part, far) for part in parts))
    return term


class _Ways(dict[int, int | None]):
    """Of a token: minus the number of the classes that its characters are in, one after the other;
    found when it is asked for."""

    def __init__(self, vocabulary: Vocabulary, first_alike: bytes) -> None:
        self._vocabulary = vocabulary
        self._first_alike = first_alike
        self._numbers: dict[bytes, int] = {}

    def __missing__(self, token_id: int) -> int | None:
        classes = self._vocabulary.spelling[token_id].translate(self._first_alike)
        if not classes or token_id in self._vocabulary.special:
            return None
        way = self[token_id] = -self._numbers.setdefault(classes, len(self._numbers) + 1)
        return way


class RegexMasks(KeptMasks):
    """Of one expression. A node is what remains. Outputs get lost by a character that is not of
    ASCII, and among too many alternatives."""

    def __init__(self, vocabulary: Vocabulary, root: Term) -> None:
        self._num_steps = 0
        # Bytes that are in the same classes lead to the same places: of each the first such.
        alike = [tuple(bits >> byte & 1 for bits in set(_classes(root))) for byte in range(256)]
        self._first_alike = bytes(alike.index(one) for one in alike)
        super().__init__(vocabulary, root)
        self.ways = _Ways(vocabulary, self._first_alike)

    def counts(self, what: Term) -> bool:
        """See `KeptMasks`."""
        return True

    def key(self, what: Term) -> Term:
        """See `KeptMasks`."""
        return _clipped(what, self.vocabulary.longest)

    def inside(self, node: Node, byte: int) -> Node | None:
        """See `KeptMasks`."""
        first = self._first_alike[byte]
        if first in node.after:
            return node.after[first]
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            return None
        try:
            term = _derivative(node.what, byte)
        except _NoTermError:
            return None
        if term is None or _size(term) > MAX_SIZE:
            return None
        node.after[first] = to = self.node(term)
        return to
