"""The test run's check of signatures: a wrong shape is found in the first calls of a function, in every test anew."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from shape_checks import CALLS, check_again, first_calls
from torch import Tensor

from poco_vla import interpolate


@jaxtyped(typechecker=first_calls)
def mean(x: Float[Tensor, "B A"]) -> Float[Tensor, " B"]:
    return x.mean(-1, keepdim=x.shape[0] == 1)


RIGHT, WRONG, WRONG_RESULT = torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(1, 3)


def test_wrong_shapes_are_found_in_the_first_calls_of_each_test():
    for _ in range(2):
        for wrong in (WRONG, WRONG_RESULT):
            with pytest.raises(TypeCheckError, match="mean"):
                mean(wrong)
        for _ in range(CALLS):
            mean(RIGHT)
        assert mean(WRONG).shape == (2, 3), "this call is not checked"
        check_again()


def test_the_librarys_signatures_are_checked():
    with pytest.raises(TypeCheckError, match="interpolate"):
        interpolate(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2))
