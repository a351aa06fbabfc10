"""Where an output is in its JSON schema: what `kept_masks` must know to keep masks by it.

llguidance does not tell its state, and a mask within a string of bounded length takes it half a
millisecond. `JsonMasks` follows outputs by the shape of their schema. A node is the phase of what
is written and how it has begun, a context the containers around it. Outputs get lost where
something is unexpected, or far inside of containers.
"""

from collections.abc import Hashable

from nanovllm.core.json_shape import BY_SPELLING, FREE, Bounds, Items, Members, Value
from nanovllm.core.kept_masks import Context, KeptMasks, Node, Vocabulary

MAX_DEPTH = 32  # of containers; what is deeper is not known
MAX_SPELLED = 20  # bytes of what counts by its spelling: longer ones seldom come again
BLANKS = b" \n\r\t"
# What comes next. FIRST: a value or the end of an array; OPEN: a name or the end of an object.
VALUE, FIRST, SCALAR, STRING, OPEN, NEXT, NAME, COLON, AFTER = range(9)
# First bytes of characters behind which the same may follow, by the first of them.
ALIKE = bytes.maketrans(
    bytes((*range(0xC2, 0xE0), *range(0xE1, 0xED), 0xEE, 0xEF, *range(0xF1, 0xF4))),
    30 * b"\xc2" + 14 * b"\xe1" + 3 * b"\xf1",
)
# What a node is: its phase, the bounds of a string, its whole characters, what it or the phase has
# begun with (unless by spelling: one character only), and whether the next character is escaped.
Spot = tuple[int, Bounds, int, bytes, bool]
# What a context is: the one around it, a container in that, and at which of its values.
Around = tuple[Context, Members | Items, int]


class JsonMasks(KeptMasks):
    """Of one schema."""

    def __init__(self, vocabulary: Vocabulary, root: Value) -> None:
        """root: what an output is."""
        self._value = root
        super().__init__(vocabulary, _at(VALUE))

    def key(self, what: Spot) -> Hashable:
        """See `KeptMasks`."""
        phase, bounds, count, text, _ = what
        if len(text) > MAX_SPELLED and phase != NAME:
            return None
        if bounds == BY_SPELLING:
            return phase, text
        return phase, text, _distance(bounds, count, self.vocabulary.longest)

    def counts(self, what: Spot) -> bool:
        """See `KeptMasks`."""
        return what[1] != BY_SPELLING and not what[3]

    def context_key(self, what: Around | None) -> tuple[Hashable, bool]:
        """The path to a value, as far as it counts."""
        if what is None:
            return None, True
        around, container, index = what
        if isinstance(container, Members):
            return (around.key, index), around.is_exact
        far = self.vocabulary.longest
        distance = _distance(container.bounds, index, far)
        is_exact = around.is_exact and distance == _distance(container.bounds, index, far + 1)
        return (around.key, min(index, len(container.first)), distance), is_exact

    def inside(self, node: Node, byte: int) -> Node | None:
        """See `KeptMasks`."""
        phase, bounds, count, text, is_escaped = node.what
        if phase in (STRING, NAME):
            if byte == ord('"') and not is_escaped:
                return self.node(_at(AFTER)) if phase == STRING else None
            is_escaped = byte == ord("\\") and not is_escaped
        elif phase == SCALAR and (byte in b",]}" or byte in BLANKS):
            return self.inside(self.node(_at(AFTER)), byte)
        elif phase != SCALAR and byte not in BLANKS:
            return self.node(_at(VALUE)) if phase == COLON and byte == ord(":") else None
        if phase == NAME or len(text) <= MAX_SPELLED:  # a longer text has no key
            text += bytes((byte,))
        if bounds != BY_SPELLING and not (text := _begun(text)):
            least, most = bounds
            count = count + 1 if most is not None else min(count + 1, least)
        return self.node((phase, bounds, count, text, is_escaped))

    def across(self, context: Context, node: Node, byte: int) -> tuple[Context, Node] | None:
        """See `KeptMasks`."""
        phase, around = node.what[0], context.what
        if phase in (VALUE, FIRST) and not (byte == ord("]") and phase == FIRST):
            return self._begin_value(context, byte)
        if around is None:
            return None  # nothing is behind the whole
        outer, container, index = around
        if byte == ord('"') and phase in (OPEN, NEXT):
            bounds = FREE if container.names is None else BY_SPELLING
            return context, self.node(_at(NAME, bounds))
        if byte == ord('"') and phase == NAME:
            index = 0 if container.names is None else container.names.get(node.what[3])
            return None if index is None else self._enter(outer, container, index, COLON)
        if byte == ord(",") and phase in (SCALAR, AFTER):
            if isinstance(container, Members):
                return context, self.node(_at(NEXT))
            return self._enter(outer, container, container.far(index + 1), VALUE)
        if byte in b"]}" and phase in (SCALAR, AFTER, FIRST, OPEN):
            return outer, self.node(_at(AFTER))
        return None

    def _begin_value(self, context: Context, byte: int) -> tuple[Context, Node] | None:
        value = self._value
        if context.what is not None:
            _, container, index = context.what
            value = container.value(index)
        if value is None or _depth(context) > MAX_DEPTH:
            return None
        if byte not in b'"{[':
            return context, self.node(_at(SCALAR, text=bytes((byte,))))
        if byte == ord('"') and value.string is not None:
            return context, self.node(_at(STRING, value.string))
        if byte == ord("{") and value.members is not None:
            return self._enter(context, value.members, -1, OPEN)
        if byte == ord("[") and value.items is not None:
            return self._enter(context, value.items, value.items.far(0), FIRST)
        return None

    def _enter(
        self, around: Context, container: Members | Items, index: int, phase: int
    ) -> tuple[Context, Node]:
        return self.context((around, container, index)), self.node(_at(phase))


def _at(phase: int, bounds: Bounds = BY_SPELLING, text: bytes = b"") -> Spot:
    """At its begin."""
    return phase, bounds, 0, text, False


def _depth(context: Context) -> int:
    return 0 if context.what is None else 1 + _depth(context.what[0])


def _begun(text: bytes) -> bytes:
    """A character, or an escape, of which all that may follow depends on this; b"" if it is whole.
    Of UTF-8 few first bytes differ in what may follow; later only how many bytes are to come."""
    num_left = _num_bytes(text) - len(text)
    if num_left == 0 or text[0] < 0x80:
        return text if num_left else b""
    return text.translate(ALIKE) if len(text) == 1 else (b"\xc2", b"\xe1")[num_left - 1]


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
