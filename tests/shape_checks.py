"""Machine-checked signatures, for jaxtyping's import hook: the first calls of each function in each test are checked.

A check takes longer than the work of a tiny network: it was more than half of the time of a test that trains.
"""

import sys
from functools import wraps

from beartype import beartype

CALLS = 20
"""Calls of a function that are checked in one test; later ones run as they do outside the test run."""
_unchecked = []


def first_calls(signature):
    """Return beartype's check of a signature; after `CALLS` calls it tells jaxtyping to leave that function alone.

    Args:
        signature: a function without a body, which jaxtyping calls with a call's arguments (and its result).
    """
    check, calls, test = beartype(signature), 0, None

    @wraps(signature)
    def counted(*args, **kwargs):
        nonlocal calls, test
        if test is not _unchecked:
            calls, test = 0, _unchecked
        calls += 1
        if calls == CALLS:
            # jaxtyping's own frame holds the function that it wraps; `__no_type_check__` is `typing.no_type_check`'s.
            function = sys._getframe(1).f_locals["fn"]
            function.__no_type_check__ = True
            _unchecked.append(function)
        return check(*args, **kwargs)

    return counted


def check_again():
    """Check each function's next calls, as at the start of a test."""
    global _unchecked
    for function in _unchecked:
        function.__no_type_check__ = False
    _unchecked = []
