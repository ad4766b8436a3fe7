"""Symbolic sizes of a program: names and arithmetic over numbers that stand in for them.

    text = symbols.new("text")               # a Size, and an int: 100_003
    torch.empty(batch, text + 1, 32)         # under a FakeTensorMode; shapes hold plain ints
    symbols.decode(50_001)                   # Size "text // 2"
    symbols.decode(128_256)                  # None: a vocabulary

Static shape inference is a hundred times faster than that over SymInts, so every length is a number,
a prime of its own, while shapes are propagated. What tensor code makes of lengths is read off the
number again:

    length + b            -4 <= b <= 128           sentinels, learned tokens that were appended
    k * length + b        k <= 4, |b| <= 4
    length // q + b       q <= 9 or 16, |b| <= 4   pixel shuffles, strides
    length + length' + b  0 <= b <= 1
    length * factor + b   any factor; |b| <= 4 where that is a length, else none

The primes are such that no two of these forms are one number, and none of them is a static size of
the decoder. A difference of two lengths is taken for static: what depends on it is compiled again for
each value.
"""

from collections.abc import Iterable
from functools import cache
from itertools import count
from typing import Any

from hidrop_fx.errors import PassError

# Three lengths, 128 heads and four bytes a value are below 2**63 bytes while stand-ins are below 2**18.
_SMALLEST = 100_003
_APPENDED, _NEAR, _TIMES = 128, 4, 4
_PARTS = (*range(2, 10), 16)
# Any form of any length is larger.
_CERTAINLY_STATIC = _SMALLEST // max(_PARTS) - 2 * _NEAR


class Size(int):
    """A symbolic size: the number that stands in for it, and its name, e.g. "text // 2"."""

    name: str

    def __new__(cls, number: int, name: str) -> "Size":
        size = super().__new__(cls, number)
        size.name = name
        return size

    def __getnewargs__(self) -> tuple[Any, ...]:
        return int(self), self.name

    def __add__(self, other: int) -> "Size":
        if type(other) is int and other < 0:
            return self - -other
        return Size(int(self) + other, f"{self.name} + {_text(other)}" if other else self.name)

    def __radd__(self, other: int) -> "Size":
        return self + other

    def __sub__(self, other: int) -> "Size":
        return Size(int(self) - other, f"{self.name} - {_factor(other)}" if other else self.name)

    def __mul__(self, other: int) -> "Size":
        name = f"{_factor(self)} * {_factor(other)}" if other != 1 else self.name
        return Size(int(self) * other, name)

    def __rmul__(self, other: int) -> "Size":
        return self * other

    def __floordiv__(self, other: int) -> "Size":
        return Size(int(self) // other, f"{_factor(self)} // {_factor(other)}")

    def __repr__(self) -> str:
        return f"Size({int(self)}, {self.name!r})"

    __str__ = __repr__


class Symbols:
    """The symbolic sizes of one program.

    Args:
        static: sizes that must not be taken for symbolic ones.
    """

    def __init__(self, static: Iterable[int] = ()) -> None:
        self._static = {size for size in static if size > _CERTAINLY_STATIC}
        self._lengths: list[Size] = []
        self._next = 0
        self._decoded: dict[int, Size | None] = {}

    def new(self, name: str) -> Size:
        """Return a fresh length."""
        while True:
            length = Size(_stand_in(self._next), name)
            self._next += 1
            if not any(self._would_be(length, size) for size in self._static):
                self._lengths.append(length)
                self._decoded = {}
                return length

    def _would_be(self, length: Size, size: int) -> bool:
        sums = any(0 <= size - int(length) - int(other) <= 1 for other in self._lengths)
        return sums or size % int(length) == 0 or _form(length, size) is not None

    def declare_static(self, sizes: Iterable[int], owner: str) -> None:
        """Note sizes that came in after the first lengths were made.

        Raises:
            PassError: one of them is taken by a symbolic size.
        """
        for size in sizes:
            if (found := self.decode(size)) is not None:
                raise PassError(
                    f"{owner} has the size {size}, which stands for {found.name!r} in this program; pad it "
                    "by a few rows, or let the decoder hold it when it is captured"
                )
            self._static.add(size)

    def decode(self, size: Any) -> Size | None:
        """Return the symbolic size that a number stands for; None for a static size."""
        if type(size) is not int:
            return size if isinstance(size, Size) else None
        if size not in self._decoded:
            self._decoded[size] = self._decode(size)
        return self._decoded[size]

    def is_symbolic(self, size: Any) -> bool:
        """Return True if a size in a node's `meta["val"]` stands for any number."""
        return self.decode(size) is not None

    def name(self, size: Any) -> str:
        """Return the name of a symbolic size; other sizes as they are."""
        found = self.decode(size)
        return str(size) if found is None else found.name

    def dims(self, shape: Iterable[Any]) -> tuple[int, ...]:
        """Return the dimensions of a shape that are symbolic."""
        return tuple(dim for dim, size in enumerate(shape) if self.is_symbolic(size))

    def _decode(self, size: int) -> Size | None:
        if not self._lengths or size <= _CERTAINLY_STATIC:
            return None
        for length in self._lengths:
            if (found := _form(length, size)) is not None:
                return found
        for index, length in enumerate(self._lengths):
            for other in self._lengths[index + 1 :]:
                if 0 <= size - int(length) - int(other) <= 1:
                    return length + other + (size - int(length) - int(other))
        return self._product(size) or self._near_product(size)

    def _product(self, size: int) -> Size | None:
        for length in self._lengths:
            factor, rest = divmod(size, int(length))
            if not rest and factor > 1:
                return length * (self.decode(factor) or factor)
        return None

    def _near_product(self, size: int) -> Size | None:
        for more in (*range(1, _NEAR + 1), *range(-1, -_NEAR - 1, -1)):
            for length in self._lengths:
                factor, rest = divmod(size - more, int(length))
                if not rest and (other := self.decode(factor)) is not None:
                    return length * other + more
        return None


def _form(length: Size, size: int) -> Size | None:
    """Return the function of one length that a number is, products aside."""
    more = size - int(length)
    if -_NEAR <= more <= _APPENDED:
        return length + more
    if more > 0:
        times = round(size / int(length))
        if 2 <= times <= _TIMES and abs(size - times * int(length)) <= _NEAR:
            return length * times + (size - times * int(length))
        return None
    for parts in _PARTS:
        if abs(size - int(length) // parts) <= _NEAR:
            return length // parts + (size - int(length) // parts)
    return None


@cache
def _stand_in(index: int) -> int:
    """Return a prime, another for each index, of which no form is one of those before it."""
    known, taken = [_stand_in(k) for k in range(index)], _taken(index)
    for prime in count((known[-1] + _APPENDED if known else _SMALLEST) | 1, 2):
        sums = [prime + other + more for other in known for more in (0, 1)]
        if taken.isdisjoint(sums) and _is_prime(prime) and taken.isdisjoint(_forms(prime)):
            return prime
    raise AssertionError("there are more primes")


@cache
def _taken(number: int) -> frozenset[int]:
    """Return all forms of the first stand-ins, products aside."""
    if not number:
        return frozenset()
    *known, last = [_stand_in(index) for index in range(number)]
    sums = [last + other + more for other in known for more in (0, 1)]
    return _taken(number - 1).union(_forms(last), sums)


def _forms(length: int) -> list[int]:
    """Return the numbers that `_form` takes for functions of a length."""
    near = range(-_NEAR, _NEAR + 1)
    found = [length + more for more in range(-_NEAR, _APPENDED + 1)]
    found += [times * length + more for times in range(2, _TIMES + 1) for more in near]
    return found + [length // parts + more for parts in _PARTS for more in near]


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))


def _text(size: int) -> str:
    return size.name if isinstance(size, Size) else str(size)


def _factor(size: int) -> str:
    """Return a size as an operand of a product."""
    text = _text(size)
    return f"({text})" if any(sign in text for sign in (" + ", " - ", " // ")) else text
