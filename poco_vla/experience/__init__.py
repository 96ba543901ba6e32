"""How a run gets what it learns from: demonstrations, environments and robots, episodes taken in, rollouts, prefixes.

:mod:`dataset` opens demonstrations and policy. :mod:`interactions` makes the interaction of a configuration, with which
:mod:`collector` lets the policy act; :mod:`episodes` takes what comes of it into the replay buffer, and reads it back
at a resume. :mod:`rollouts` is what an algorithm gets that learns from its latest rollouts alone.
"""
