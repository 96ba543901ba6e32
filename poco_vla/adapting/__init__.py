"""Build model adapters: fit a LeRobot checkpoint to a dataset by its names, statistics, processors and weights."""
