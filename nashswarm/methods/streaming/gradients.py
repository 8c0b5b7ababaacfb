"""Moments of matrices and gradients of states, from backward passes through one unit alone.

They are those that ``calibration.moments`` computes on the whole model: H of what a matrix reads, f of the gradients at
its outputs, with labels that the model samples.  What the blocks are called with beside hidden states counts as given.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nashswarm.calibration.missing_moments import added_sibling, mixture_of, siblings
from nashswarm.calibration.moment_sums import MomentSums, add_inputs, mean_moments
from nashswarm.calibration.moments import bfloat16_products
from nashswarm.calibration.moments_table import MomentsTable, PackedMoments
from nashswarm.calibration.nll import summed_nll
from nashswarm.calibration.reach import is_product
from nashswarm.layers import Moments
from nashswarm.methods.streaming.skeleton import shape_of
from nashswarm.methods.streaming.surroundings import Call, Surroundings
from nashswarm.models.evaluation import without_cache

States = Float[Tensor, "windows length *width"]
Groups = Sequence[tuple[str, ...]]  # matrices that read the same input, by their names in the block


@contextlib.contextmanager
def _sums_of(modules: Mapping[str, nn.Module], logits: str = "", zipf: bool = False) -> Iterator[dict[str, MomentSums]]:
    """Collect the sums of these modules during the context; those that are no products keep none.

    ``logits``: the one of them whose outputs are the logits of tokens.  ``zipf``: whether rows are of tokens.
    """
    sums = {name: MomentSums(part, name == logits, zipf, None, lambda: False) for name, part in modules.items()}

    def add(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if name not in sums or not torch.is_grad_enabled():
            return output
        if not is_product(module, arguments, output):
            del sums[name]
            return output
        return sums[name].add_inputs(module, arguments, output)

    handles = [part.register_forward_hook(functools.partial(add, name)) for name, part in modules.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def backward(
    block: nn.Module, calls: Sequence[Call], inputs: States, gradients: States, names: Sequence[str]
) -> tuple[MomentsTable, States]:
    """Return the moments of the matrices ``names`` of a block, and the gradients at its ``inputs``.

    ``gradients``: those at its outputs.  A matrix that no gradient reaches has no moments.
    """
    returned = torch.empty_like(inputs)
    with bfloat16_products(), _sums_of({name: block.get_submodule(name) for name in names}) as sums:
        for number, (call, states) in enumerate(zip(calls, inputs, strict=True)):
            leaf = states.detach().requires_grad_()
            with torch.enable_grad():
                outputs = call.run(block, leaf.clone())  # which a block may change in place
            add_inputs(sums.values())
            torch.autograd.backward(outputs, gradients[number])
            del outputs
            for part in sums.values():
                part.end_window()
            assert leaf.grad is not None
            returned[number] = leaf.grad
        positions = inputs.shape[0] * inputs.shape[1]
        return mean_moments(sums, positions), returned


def check_backward(block: nn.Module, name: str, call: Call, states: Float[Tensor, "length *width"]) -> None:
    """Raise ValueError in one sentence if gradients do not pass through the block ``name``."""
    leaf = states.detach().requires_grad_()
    try:
        with torch.enable_grad():
            outputs = call.run(block, leaf.clone())
        torch.autograd.backward(outputs, torch.ones_like(outputs))
        assert leaf.grad is not None, "its outputs do not depend on its inputs"
    except Exception as error:  # of whatever the architecture does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"gradients do not pass through {name}, a {type(block).__name__} ({reason}): say --method gptq, which "
            "needs none"
        ) from error


def for_each_pass(
    block: nn.Module,
    groups: Groups,
    rows: Mapping[str, int],
    calls: Sequence[Call],
    inputs: States,
    gradients: States,
    use: Callable[[Sequence[str], Mapping[str, Moments]], None],
) -> States:
    """Let ``use`` see the moments of all matrices of a block, and return the gradients at its ``inputs``.

    The moments are gathered in several passes, each of which holds about as many numbers as the block has weights.
    ``rows``: how many inputs each matrix reads.  An expert that reads none gets the mean of the others in its layer.
    """
    means: dict[tuple[str, str], Moments] = {}
    used = [name for group in groups for name in group if rows[name]]
    unused = [name for group in groups for name in group if not rows[name] and _is_routed(block, name)]
    missing = {name: found for name in unused if (found := siblings(name, used))}
    roles = {_role(name): len(found) for name, found in missing.items()}
    returned: States | None = None
    for names in split_into_passes(block, [group for group in groups if any(rows[name] for name in group)]):
        table, back = backward(block, calls, inputs, gradients, names)
        returned = back if returned is None else returned
        del back
        for name in (name for name in table if _role(name) in roles):
            role = _role(name)
            means[role] = added_sibling(means.get(role), table[name], rows[name], roles[role])
        use(list(table), table)
        table.data.clear()
    for role, mean in means.items():
        table, packed = MomentsTable(), PackedMoments.of(mean)
        table.data = {name: packed for name in missing if _role(name) == role}
        use(list(table), table)
    if returned is None:  # no matrix reads anything
        _, returned = backward(block, calls, inputs, gradients, ())
    return returned


def split_into_passes(block: nn.Module, groups: Groups) -> list[list[str]]:
    """Split matrices into passes, whose moments hold no more numbers than the block has weights."""
    most = sum(part.numel() for part in block.parameters())
    parts: list[list[str]] = []
    size = 0
    for group in groups:
        entries = (1 + len(group)) * shape_of(block.get_submodule(group[0]))[1] ** 2 // 2  # halves: of H, and of each
        if not parts or size + entries > most:
            parts.append([])
            size = 0
        parts[-1].extend(group)
        size += entries
    return parts


def _is_routed(block: nn.Module, name: str) -> bool:
    return bool(getattr(block.get_submodule(name), "routed", False))


def _role(name: str) -> tuple[str, str]:
    """Return the mixture that holds a matrix of an expert, and which of its matrices it is."""
    return mixture_of(name), name.rpartition(".")[2]


def head_backward(
    surroundings: Surroundings,
    head: str,
    weight: Float[Tensor, "vocabulary hidden"],
    windows: Int[Tensor, "windows length"],
    states: States,
    seed: int,
) -> tuple[MomentsTable, States]:
    """Return the moments of the module ``head``, and the gradients at the last ``states``.

    The gradients are those of the negative log-likelihood of labels that the model samples (``seed``).
    """
    returned = torch.empty_like(states)
    generator = torch.Generator().manual_seed(seed)
    surroundings.open_head(weight)
    model = surroundings.model
    hooks = _sums_of({head: model.get_output_embeddings()}, logits=head, zipf=True)
    with bfloat16_products(), hooks as sums, without_cache(model):
        for number, window in enumerate(windows):
            leaf = states[number].detach().requires_grad_()
            with torch.enable_grad():
                surroundings.end_in(leaf.clone())
                scalar = summed_nll(model, window, generator)
            add_inputs(sums.values())
            scalar.backward()
            del scalar
            for part in sums.values():
                part.end_window()
            assert leaf.grad is not None
            returned[number] = leaf.grad
        return mean_moments(sums, windows.numel()), returned


def embedding_backward(
    surroundings: Surroundings, embedding: str, windows: Int[Tensor, "windows length"], gradients: States
) -> MomentsTable:
    """Return the moments of the module ``embedding``; ``gradients``: those at the inputs of the first block."""
    module = surroundings.model.get_submodule(embedding)
    with bfloat16_products(), _sums_of({embedding: module}, zipf=True) as sums:
        for window, gradient in zip(windows, gradients, strict=True):
            torch.autograd.backward(surroundings.embedded(window), gradient)
        return mean_moments(sums, windows.numel())
