"""A device that is not there is said before weights are read."""

import pytest
import torch

from poco_vla.devices import check_device
from poco_vla.errors import ConfigError


def test_a_cpu_is_always_there():
    check_device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cpu:x"])
def test_a_device_that_is_not_there_is_said_in_a_sentence_with_those_that_are(name):
    with pytest.raises(ConfigError, match=rf'"{name}" cannot be used here .*this machine has cpu') as caught:
        check_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_not_said_to_be_damaged_weights():
    with pytest.raises(ConfigError, match='"cuda" cannot be used here'):
        check_device("cuda")
