"""The instruction that a policy is told in an environment: the environment's, the configuration's, or the data's."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from poco_vla.config import EnvSpec
from poco_vla.simulators import name_of

SHOWN = 5
"""Instructions that a message lists."""


def settle_instruction(spec: EnvSpec, told: Sequence[str], known: Iterable[str], say: Callable[[str], None]) -> EnvSpec:
    """Decide what the policy is told, and say once where that is not what the environment and the data agree on.

    Args:
        spec: the environment.
        told: instructions that it gave after resets; "" where it gave none.
        known: instructions of the demonstrations.
        say: tells a person one line.

    Returns:
        `spec`, with the demonstrations' only instruction where the environment gives none.
    """
    known = list(dict.fromkeys(text.strip() for text in known))
    name = name_of(spec)
    if spec.instruction is not None:
        if spec.instruction.strip() not in known:
            say(f'warning: env.instruction "{spec.instruction}" is not among the demonstrations\' ({_listed(known)})')
        return spec
    given = list(dict.fromkeys(text.strip() for text in told))
    if not any(given):
        if len(known) == 1 and known[0]:
            say(
                f'{name} gives no instruction: the policy is told that of the demonstrations, "{known[0]}" '
                "(env.instruction tells it another)"
            )
            return replace(spec, instruction=known[0])
        if len(known) > 1:
            say(
                f"warning: {name} gives no instruction, and the demonstrations have {len(known)} ({_listed(known)}): "
                "the policy is told nothing; say which one with env.instruction"
            )
        return spec
    unknown = [text for text in given if text not in known]
    if unknown:
        say(
            f'warning: {name} gives the instruction "{unknown[0]}", which is not among the demonstrations\' '
            f"({_listed(known)}): a policy that reads it was not trained on it; env.instruction says what to tell it "
            "instead"
        )
    return spec


def _listed(texts: Sequence[str]) -> str:
    shown = ", ".join(f'"{text}"' for text in texts[:SHOWN])
    return f"{shown} and {len(texts) - SHOWN} more" if len(texts) > SHOWN else shown
