"""The state of a run: what is saved, when, where, and how it is loaded again."""
