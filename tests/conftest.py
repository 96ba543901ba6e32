"""The order of the tests."""


def pytest_collection_modifyitems(items):
    """Slow ones first, and of these the groups that one worker runs alone: else a minute's test that comes last keeps
    one worker busy while the others have nothing left. Where there is no difference, files stay in their order."""

    def rank(item):
        slow = item.get_closest_marker("slow") is not None
        return 0 if slow and item.get_closest_marker("xdist_group") else 1 if slow else 2

    items.sort(key=rank)
