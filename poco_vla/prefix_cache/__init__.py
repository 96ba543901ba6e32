"""The prefixes of a frozen backbone, each computed once and kept: in the accelerator's memory, in RAM, on disk."""
