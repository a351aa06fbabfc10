"""Where an output is in its JSON schema, as a key: where keys are equal, so are the masks.

llguidance does not tell its state, and a mask within a string of bounded length takes it half a
millisecond. A `JsonPlace` follows one output by the shape of its schema, for `Matcher`, which keeps
masks by its key. It has none where something is unexpected, or far inside of containers.
"""

from collections.abc import Hashable
from typing import Any

from nanovllm.core.json_shape import BY_SPELLING, FREE, Bounds, Items, Members, Shape, Value

MAX_DEPTH = 32  # of containers; what is deeper has no key
MAX_SPELLED = 20  # bytes of what counts by its spelling: longer ones seldom come again
BLANKS = b" \n\r\t"
# What comes next. FIRST: a value or the end of an array; OPEN: a name or the end of an object.
VALUE, FIRST, SCALAR, STRING, OPEN, NEXT, NAME, COLON, AFTER = range(9)


class JsonPlace:
    """At the beginning of an output of `shape`."""

    __slots__ = (
        *("_bounds", "_count", "_escaped", "_is_lost", "_key", "_open", "_path", "_phase"),
        *("_text", "_value", "kept"),
    )

    def __init__(self, shape: Shape) -> None:
        self.kept = shape
        self._open: list[tuple[Members | Items, int]] = []  # containers, and at which of its values
        self._path: tuple[Hashable, ...] = ()  # the same, as far as it counts
        self._phase = VALUE
        self._value: Value | None = shape.root  # which comes next
        self._text = b""  # what the phase has begun with, or blank space
        self._bounds = BY_SPELLING  # of a string; unless by spelling, `_text` is one character only
        self._count = 0  # its whole characters
        self._escaped = self._is_lost = False
        self._key: Hashable = None

    def copy(self) -> "JsonPlace":
        """Another one at the same place."""
        copy: JsonPlace = object.__new__(JsonPlace)
        copy.kept, copy._open, copy._path = self.kept, self._open.copy(), self._path
        copy._phase, copy._value, copy._text = self._phase, self._value, self._text
        copy._bounds, copy._count, copy._key = self._bounds, self._count, self._key
        copy._escaped, copy._is_lost = self._escaped, self._is_lost
        return copy

    @property
    def key(self) -> Hashable:
        """What the mask depends on; None: it is not known."""
        is_known = len(self._text) <= MAX_SPELLED or self._phase == NAME  # of a few, or one byte
        if self._key is None and not self._is_lost and is_known:
            here: Hashable = self._text
            if self._bounds is not BY_SPELLING:
                here = (
                    _distance(self._bounds, self._count, self.kept.vocabulary.longest),
                    self._text,
                )
            self._key = (self._path, self._phase, here)
        return self._key

    @property
    def exact(self) -> Hashable:
        """What all that may follow depends on; None: it is not known."""
        if self.key is None:
            return None
        at = [(one, one.far(i) if isinstance(one, Items) else i) for one, i in self._open]
        (least, most), count = self._bounds, self._count
        return (*at, self._phase, self._text, count if most is not None else min(count, least))

    def num_plain(self, token_id: int) -> int:
        """Characters of a token within a string of which only their number counts; else 0."""
        if self._bounds is BY_SPELLING or self._text:
            return 0
        return -(self.kept.vocabulary.ways[token_id] or 0)

    def take(self, token_id: int) -> None:
        """Go on by a token that has been accepted."""
        self._key = None
        if num_plain := self.num_plain(token_id):
            self._count += num_plain  # most tokens
            return
        for byte in self.kept.vocabulary.spelling[token_id]:
            if self._is_lost:
                return
            self._step(byte)

    def _step(self, byte: int) -> None:
        phase = self._phase
        if phase in (STRING, NAME):
            self._go_on_string(byte)
        elif phase == SCALAR:
            if byte in b",]}" or byte in BLANKS:
                self._enter(AFTER)
                self._step(byte)
            else:
                self._spell(byte)
        elif byte in BLANKS:
            self._spell(byte)
        elif phase in (VALUE, FIRST) and not (byte == ord("]") and phase == FIRST):
            self._begin_value(byte)
        elif byte == ord('"') and phase in (OPEN, NEXT):
            members = self._open[-1][0]
            free = isinstance(members, Members) and members.names is None
            self._enter(NAME, bounds=FREE if free else BY_SPELLING)
        elif byte == ord(":") and phase == COLON:
            self._enter(VALUE, self._value)
        elif byte == ord(",") and phase == AFTER and self._open:
            self._go_on()
        elif byte in b"]}" and phase in (AFTER, FIRST, OPEN) and self._open:
            self._open.pop()
            self._path = self._path[:-1]
            self._enter(AFTER)
        else:
            self._is_lost = True

    def _spell(self, byte: int) -> None:
        if self._phase == NAME or len(self._text) <= MAX_SPELLED:  # a longer text has no key
            self._text += bytes((byte,))

    def _enter(
        self, phase: int, value: Value | None = None, *, bounds: Bounds = BY_SPELLING
    ) -> None:
        self._phase, self._value, self._bounds = phase, value, bounds
        self._text, self._count = b"", 0

    def _begin_value(self, byte: int) -> None:
        value = self._value
        if value is None or len(self._open) > MAX_DEPTH:
            self._is_lost = True
        elif byte not in b'"{[':
            self._enter(SCALAR)
            self._text = bytes((byte,))
        elif byte == ord('"') and value.string is not None:
            self._enter(STRING, bounds=value.string)
        elif byte == ord("{") and value.members is not None:
            self._open.append((value.members, -1))
            self._path += (-1,)
            self._enter(OPEN)
        elif byte == ord("[") and value.items is not None:
            self._open.append((value.items, 0))
            self._path += (self._item(value.items, 0),)
            self._enter(FIRST, value.items.value(0))
        else:
            self._is_lost = True

    def _go_on_string(self, byte: int) -> None:
        if byte == ord('"') and not self._escaped:
            if self._phase == NAME:
                self._end_name()
            else:
                self._enter(AFTER)
            return
        self._escaped = byte == ord("\\") and not self._escaped
        self._spell(byte)
        if self._bounds is not BY_SPELLING and len(self._text) >= _num_bytes(self._text):
            self._text = b""
            self._count += 1

    def _end_name(self) -> None:
        members = self._open[-1][0]
        assert isinstance(members, Members)
        index = 0 if members.names is None else members.names.get(self._text)
        if index is None:
            self._is_lost = True
            return
        self._open[-1] = (members, index)
        self._path = (*self._path[:-1], index)
        self._enter(COLON, members.values[index])

    def _go_on(self) -> None:
        """After a comma."""
        container, index = self._open[-1]
        if isinstance(container, Members):
            self._enter(NEXT)
            return
        self._open[-1] = (container, index + 1)
        self._path = (*self._path[:-1], self._item(container, index + 1))
        self._enter(VALUE, container.value(index + 1))

    def _item(self, items: Items, index: int) -> tuple[Any, ...]:
        """What counts of its number."""
        far = self.kept.vocabulary.longest
        return (min(index, len(items.first)), *_distance(items.bounds, index, far))


def _distance(bounds: Bounds, count: int, far: int) -> tuple[int, int | None]:
    """How many more there must and may be, up to `far`."""
    least, most = bounds
    return min(max(least - count, 0), far), None if most is None else min(most - count, far)


def _num_bytes(text: bytes) -> int:
    """Of the character, in UTF-8, or of the escape that begins so."""
    lead = text[0]
    if lead == ord("\\"):
        return 6 if text[1:2] == b"u" else 2
    return 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
