"""Acting: the actor, and environments side by side, in step with the learner, beside it, or on other machines."""

from typing import TYPE_CHECKING

from poco_vla.lazy import load_on_demand

if TYPE_CHECKING:
    from poco_vla.rollout.actor import Actor
    from poco_vla.rollout.pool import EnvPool

__getattr__, __dir__ = load_on_demand(__name__, {"actor": ["Actor"], "pool": ["EnvPool"]})

__all__ = ["Actor", "EnvPool"]
