"""Trained weights on disk and on the Hub: where a model lies, its tensors, head files, LoRA."""
