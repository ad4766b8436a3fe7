"""A bound method of one object in place of another: an instance attribute, removed without a trace."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

from hidrop_fx.runtime.runtime import Runtime


class Override(ABC):
    """A bound method in place of another, with its signature."""

    def __init__(self, owner: Any, name: str, runtime: Runtime) -> None:
        self.name = name
        self.runtime = runtime
        self.owner = owner
        self.previous: Any = owner.__dict__.get(name)
        """Attribute that the instance had under this name already, e.g. a hook of another library."""

    @cached_property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Callable[..., Any]:
        """The method that this one stands in for."""
        if self.previous is not None:
            return self.previous
        bound: Callable[..., Any] = getattr(type(self.owner), self.name).__get__(self.owner)
        return bound

    def install(self) -> None:
        """Put it in place of the original."""
        setattr(self.owner, self.name, self)

    @property
    def in_force(self) -> bool:
        """True if nothing else has taken its place."""
        return self.owner.__dict__.get(self.name) is self

    def remove(self) -> None:
        """Give the instance back what it had."""
        delattr(self.owner, self.name)
        if self.previous is not None:
            setattr(self.owner, self.name, self.previous)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return positional and keyword arguments by name."""
        if not args:
            return kwargs
        bound = self.__signature__.bind(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        return {**bound, **extra}

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the original."""
