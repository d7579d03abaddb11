"""Names of the first edition: they work for one more version, and say what they are called now."""

import functools
import warnings
from typing import Any


def warn(old: str, new: str) -> None:
    warnings.warn(f"tinyhall: {old} is now {new}", FutureWarning, stacklevel=3)


def keywords(**names: str) -> Any:
    """Takes the old keywords of a function for the new ones: `old="new"`."""

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                warn(f"{old} of {function.__qualname__.removesuffix('.__init__')}", names[old])
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return wrap


def fields(**names: str) -> Any:
    """The same for the fields of a dataclass."""

    def wrap(cls: Any) -> Any:
        cls.__init__ = keywords(**names)(cls.__init__)
        return cls

    return wrap
