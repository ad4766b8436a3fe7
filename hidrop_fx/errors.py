"""Every error that hidrop_fx raises on purpose. Catch `HidropError` for all of them."""

__all__ = [
    "CacheError",
    "CaptureError",
    "HidropError",
    "InputError",
    "PassError",
    "ScheduleError",
    "UnsupportedModelError",
]


class HidropError(Exception):
    """Base of all errors of this package."""


class ScheduleError(HidropError, ValueError):
    """A schedule, or the numbers that a plan is made from, make no sense together."""


class UnsupportedModelError(HidropError, TypeError):
    """The model is of a kind that cannot be compiled, or does not tell what is needed."""


class InputError(HidropError, ValueError):
    """A compiled model was called with inputs that it cannot take."""


class CaptureError(HidropError, RuntimeError):
    """The decoder could not be captured as one graph, or the graph is not the expected one."""


class PassError(HidropError, RuntimeError):
    """A graph pass found no place for its rewrite, or left the graph in a wrong state."""


class CacheError(HidropError, TypeError):
    """A KV cache of the wrong kind, or one that is asked for what it cannot do."""
