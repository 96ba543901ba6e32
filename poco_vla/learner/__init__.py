"""The learner: an algorithm on one of Accelerate's backends, its memory, and the processes of a launch."""
