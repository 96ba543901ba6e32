"""Offline data made on the spot: by a simulator's scripted expert, or from the official data sets."""
