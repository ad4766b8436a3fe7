"""A number that notes whether code looks at it: a layer's own, while the layer is traced for others too."""

from typing import Any

_SKIPPED = frozenset(
    (
        *("__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__delattr__"),
        *("__init_subclass__", "__subclasshook__", "__dir__", "__doc__", "__getnewargs__"),
        *("__reduce__", "__reduce_ex__", "__getstate__", "__sizeof__"),
    )
)


class WatchedNumber:
    """Answers as an int in all that code can ask of one, and sets `seen` at the first question.

    No subclass of int: C code that indexes a list reads the value of one without a call.
    """

    def __init__(self, value: int) -> None:
        self.value = value
        self.seen = False

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # `isinstance(layer_idx, int)` is a question, too.
        self.seen = True
        return int


def _answering(name: str) -> Any:
    def method(self: WatchedNumber, *args: Any) -> Any:
        self.seen = True
        return getattr(self.value, name)(*args)

    return method


for _name in dir(int):
    if _name not in _SKIPPED:
        setattr(WatchedNumber, _name, _answering(_name))


def plain_number(value: Any) -> Any:
    """Return the int behind a watched number without a note of it; others as they are."""
    return vars(value)["value"] if type(value) is WatchedNumber else value
