"""What model adapters are built from: where a model lies, its weights, names, statistics, processors and head files."""
