"""A policy on one machine, the robot on another: openpi's websocket protocol, without pickle.

The robot's side is :mod:`client`, which needs numpy, msgpack and websockets; the policy's side is :mod:`server`, which
needs the rest. Nothing is imported here, so that a robot's PC loads its own side only.
"""
