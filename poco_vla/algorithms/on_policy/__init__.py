"""Algorithms that learn from their latest rollouts alone; :mod:`contract` says what such a one offers besides."""
