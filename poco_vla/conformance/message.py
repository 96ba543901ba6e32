"""The message of a contract that is broken, alike for policies and algorithms."""

from collections.abc import Sequence


def broken_contract(name: str, contract: str, points: Sequence[str]) -> str:
    """Return a message that numbers every point in which a class breaks a contract.

    Args:
        name: of the class.
        contract: public name of the class of poco_vla whose contract it is.
        points: each in words, at least one.
    """
    count = "1 point" if len(points) == 1 else f"{len(points)} points"
    listed = "\n".join(f"{i}. {point}" for i, point in enumerate(points, 1))
    return f"{name} breaks the contract of poco_vla.{contract} in {count}:\n{listed}"
