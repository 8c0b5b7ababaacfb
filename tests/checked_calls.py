"""Check the types and shapes of each kind of call once, instead of those of every call.

The hook of jaxtyping lets beartype check the arguments and the result of every call in the package, which takes more
than half the time of a test that runs a whole method.  What a check finds follows from the types of the values, the
dtypes and shapes of arrays and tensors, and the words that a ``Literal`` allows.  Here these make the kind of a call:
the first call of a kind is checked as before, and a later one of the same kind would pass as the first did.  A value
whose kind would take long to tell is checked at every call.

Importing this module changes jaxtyping, so that it is imported before the package.
"""

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Collection, Hashable
from typing import Any

import jaxtyping
import jaxtyping._decorator
import numpy as np
import torch

LONGEST = 64  # of a collection, and of a word, whose content is looked at
Seen = dict[Hashable, set[Hashable]]  # kind of the arguments → kinds of the results
seen_by_annotations: dict[Hashable, Seen] = {}
decorate = jaxtyping.jaxtyped


class Indescribable(Exception):
    """The kind of a value would take long to tell."""


def kind(value: Any) -> Hashable:
    """Return what an annotation can tell about a value."""
    return teller(type(value))(value)


@functools.cache
def teller(form: type) -> Callable[[Any], Hashable]:
    """Return what tells the kinds of the values of a type."""
    if issubclass(form, torch.Tensor | np.ndarray):
        return lambda array: (form, array.dtype, tuple(array.shape))
    if issubclass(form, str):
        return lambda word: (form, word if len(word) <= LONGEST else None)
    if issubclass(form, type):
        return lambda one: (form, one)
    if issubclass(form, dict):
        return lambda table: (form, *items(table), *items(table.values()))
    if issubclass(form, tuple | list | set | frozenset):
        return lambda values: (form, *items(values))
    if issubclass(form, Collection) and not issubclass(form, bytes | bytearray | range):
        return indescribable
    return type


def items(values: Collection[Any]) -> list[Hashable]:
    return indescribable() if len(values) > LONGEST else [kind(value) for value in values]


def indescribable(*_: Any) -> Any:
    raise Indescribable


def result_like(function: Callable[..., Any], result: threading.local) -> Callable[..., Any]:
    """Return a function with the annotations of another one that returns the value of ``result``."""

    def again(*_: Any, **__: Any) -> Any:
        return result.value

    # annotations in quotation marks are looked up among the globals of their function
    copied = types.FunctionType(again.__code__, function.__globals__, function.__name__, None, again.__closure__)
    return functools.wraps(function)(copied)


def seen_of(function: Callable[..., Any]) -> Seen:
    """Return what was seen of a function, and of others of the same annotations: one inside another is made anew by
    each call of that one, and compiling its checks takes milliseconds."""
    annotations = function.__code__, function.__module__, *function.__annotations__.items()
    try:
        return seen_by_annotations.setdefault(annotations, {})
    except TypeError:  # an annotation without a hash
        return {}


def check_once(function: Callable[..., Any], checker: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that checks its arguments and its result where their kinds are new, and else only calls."""
    seen = seen_of(function)
    result = threading.local()

    @functools.cache
    def checked() -> Callable[..., Any]:
        return decorate(function, typechecker=checker)

    @functools.cache
    def checked_result() -> Callable[..., Any]:
        return decorate(result_like(function, result), typechecker=checker)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        try:
            given = (*items(args), *kwargs, *items(kwargs.values()))
            known = seen.get(given)
        except (Indescribable, TypeError):  # a symbolic size has no hash
            return checked()(*args, **kwargs)
        if known is None:
            value = checked()(*args, **kwargs)
            known = seen.setdefault(given, set())
        else:
            value = function(*args, **kwargs)
            with contextlib.suppress(Indescribable, TypeError):
                if kind(value) in known:
                    return value
            result.value = value
            checked_result()(*args, **kwargs)
            del result.value
        with contextlib.suppress(Indescribable, TypeError):
            known.add(kind(value))
        return value

    call.checked_once = True  # type: ignore[attr-defined]
    return call


def jaxtyped(function: Any = None, *, typechecker: Any = None) -> Any:
    """Stand in for ``jaxtyping.jaxtyped``."""
    if function is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if getattr(function, "checked_once", False):
        return function
    if typechecker is not None and isinstance(function, types.FunctionType):
        return check_once(function, typechecker)
    return decorate(function, typechecker=typechecker)


jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = jaxtyped
