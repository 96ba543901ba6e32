"""Runs of several algorithms on one recipe: what is missing, side by side, each in a process of its own.

``member``     a run of a comparison: its folder, its command, how far it is
``schedule``   starts runs as their turn comes, stops them, and notes what they took
``table``      the live table of a comparison
"""
