"""Memory that tensors have freed serves the next ones."""

import platform
import resource

import pytest
import torch

from poco_vla.learner.allocator import keep_freed_memory

SIZE = 6 * 1024**2
"""Float32 numbers of a tensor: 24 MB, 6,144 pages."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_what_is_freed_is_not_fetched_again_page_by_page():
    """Ten rounds of three tensors are 184,320 pages; the first rounds fetch what is not there yet."""
    keep_freed_memory()

    def fetched():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.empty(SIZE).fill_(1) for _ in range(3)]
        del tensors
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    for _ in range(10):
        fetched()
    assert sum(fetched() for _ in range(10)) < 6_144
