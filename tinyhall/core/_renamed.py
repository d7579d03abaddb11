"""Names of the first edition: they work for one more version, and say what they are called now."""

import functools
import warnings
from typing import Any

from . import _check


def warn(old: str, new: str) -> None:
    warnings.warn(f"tinyhall: {old} is now {new}", FutureWarning, stacklevel=3)


def keywords(**names: str) -> Any:
    """Takes the old keywords of a function, or of a class, for the new ones: `old="new"`. A call with both raises
    TinyhallError."""

    def wrap(made: Any) -> Any:
        function = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new, name = names[old], function.__qualname__.removesuffix(".__init__")
                if new in kwargs:
                    raise _check.TinyhallError(f"{new}: expected it alone in {name}, got also {old}, its old name")
                warn(f"{old} of {name}", new)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        if not isinstance(made, type):
            return call
        made.__init__ = call  # type: ignore[misc]
        return made

    return wrap
