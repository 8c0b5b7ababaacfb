"""That no call escapes the check of its shapes whose kind was not checked before."""

import contextlib
from typing import Any, Literal

import beartype
import numpy as np
import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from nashswarm.quant.grid import row_blocks
from tests.checked_calls import LONGEST, Indescribable, check_once, kind


def checked(function: Any) -> Any:
    return check_once(function, beartype.beartype)


@checked
def product(left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    return left @ right if left[0, 0] else left @ right[:, :-1]


@checked
def length(values: list[int] | dict[str, int], order: Literal["up", "down"] = "up") -> int:
    return len(values) + (order == "down")


def test_functions_of_the_package_are_checked() -> None:
    assert row_blocks.checked_once  # type: ignore[attr-defined]
    for rows in (1, "one", 1, "one"):
        with pytest.raises(TypeCheckError) if rows == "one" else contextlib.nullcontext():
            row_blocks(rows)  # type: ignore[arg-type]


def test_call_of_another_shape_or_dtype_is_checked_after_one_that_passed() -> None:
    for _ in range(2):
        assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    for left, right in (
        (torch.ones(2, 4), torch.ones(3, 4)),
        (torch.ones(2, 3), torch.ones(3, 4).int()),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(2, 3), np.ones((3, 4), np.float32)),
    ):
        for _ in range(2):  # what failed is not taken for known
            with pytest.raises(TypeCheckError):
                product(left, right)
    assert product(torch.ones(2, 5), torch.ones(5, 4)).shape == (2, 4)


def test_result_of_another_shape_is_checked_after_one_that_passed() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="return value"):
            product(torch.zeros(2, 3), torch.ones(3, 4))


def test_items_and_words_are_checked_after_others_that_passed() -> None:
    assert length([1, 2]) == length([3, 4]) == length({"a": 1, "b": 2}) == 2
    assert length([1], "down") == length([1], order="down") == 2
    for wrong in ([1.5, 2.5], {1: 1}, {"a": "b"}, (1, 2)):
        with pytest.raises(TypeCheckError):
            length(wrong)
    with pytest.raises(TypeCheckError):
        length([1], "left")
    with pytest.raises(TypeCheckError):
        length([1], order="left")
    with pytest.raises(TypeError, match="unexpected keyword"):
        length([1], other="up")


def test_function_inside_another_is_checked_by_its_own_annotations() -> None:
    def make(form: Any) -> Any:
        def inner(value: form) -> form:
            return value

        return checked(inner)

    for _ in range(2):
        assert make(int)(1) == 1 and make(str)("1") == "1"
        for form, wrong in ((int, "1"), (str, 1)):
            with pytest.raises(TypeCheckError):
                make(form)(wrong)


def test_long_collections_are_checked_at_every_call() -> None:
    assert length([0] * (LONGEST + 1)) == length([1] * (LONGEST + 1)) == LONGEST + 1
    with pytest.raises(TypeCheckError):
        length(["0"] * (LONGEST + 1))
    with pytest.raises(Indescribable):
        kind([0] * (LONGEST + 1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.ones(2), torch.nn.Parameter(torch.ones(2))),
        (np.ones(2), np.ones(2, np.float32)),
        (np.ones(2), torch.ones(2)),
        (1, True),
        (1, 1.0),
        ("up", "down"),
        (int, float),
        ([1], (1,)),
        ([1], [1, 1]),
        ([1], [None]),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": "1"}),
        ([[torch.ones(1)]], [[torch.ones(2)]]),
    ],
)
def test_kind_of_values_that_an_annotation_tells_apart_differs(one: Any, other: Any) -> None:
    assert kind(one) != kind(other) and kind(one) == kind(one)


def test_decorator_leaves_what_is_no_function_to_jaxtyping() -> None:
    @jaxtyped(typechecker=beartype.beartype)
    class Held:
        @jaxtyped(typechecker=beartype.beartype)
        @classmethod
        def double(cls, value: int) -> int:
            return 2 * value

        @jaxtyped(typechecker=beartype.beartype)
        @property
        def name(self) -> int:
            return "no number"  # type: ignore[return-value]

    assert Held.double(2) == 4
    with pytest.raises(TypeCheckError):
        Held.double("2")
    with pytest.raises(TypeCheckError):
        assert Held().name
