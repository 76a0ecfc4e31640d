"""Observed objects: the class of one object is replaced by a subclass of it."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

_PACKAGE = __name__.partition(".")[0]

_subclasses: dict[tuple[type, type], type] = {}


def extend(shared: Any, extension: type) -> None:
    """Put the methods of `extension` in front of those that one object has from this package.

    Objects that nobody observes run the same instructions as if this did not exist.

    :param shared: an object that has not been extended yet
    :param extension: a class without state; its ``super()`` is a class of this package
    """
    cls = type(shared)
    subclass = _subclasses.get((cls, extension))
    if subclass is None:
        ours = next(base for base in cls.__mro__ if base.__module__.partition(".")[0] == _PACKAGE)
        subclass = _subclass(ours, (extension, ours))
        if ours is not cls:
            # Of a subclass of a user, the overrides come first: they may have other arguments and
            # results. They call the methods of `extension` by ``super()``.
            subclass = _subclass(cls, (_Unnoticed, cls, subclass))
        _subclasses[cls, extension] = subclass
    # A class of a user may refuse to have its attributes set.
    object.__setattr__(shared, "__class__", subclass)


class _Unnoticed:
    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Do nothing, so that the method of a user is not called."""


def _subclass(cls: type, bases: tuple[type, ...]) -> type:
    """Return a class with the name of `cls`, unknown to metaclass and ``__init_subclass__``."""
    namespace = {
        "__slots__": (),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    new: Any = ABCMeta.__new__ if isinstance(cls, ABCMeta) else type.__new__
    subclass: type = new(type(cls), cls.__name__, bases, namespace)
    return subclass
