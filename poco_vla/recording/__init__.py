"""Online episodes on disk: which of them are accepted, and the LeRobot datasets that grow by one at a time."""
