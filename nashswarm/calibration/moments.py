"""Second moments of every weight matrix, from one forward and one backward pass per window of calibration text.

Let x be the input of a matrix at a position, and g the gradient of the window's summed negative log-likelihood (NLL) in
its output there.  A matrix that multiplies has ``H = E[x xᵀ]`` and ``f = E[g²]``; a matrix that is looked up has the
frequency of each row in place of H.  They give the damage of an error E to second order, in nats per token (Hassibi &
Stork 1993; K-FAC with a diagonal output factor, Kim et al. 2025):  ``D(E) = ½ Σ_o f_o · e_oᵀ H e_o``.

An error in a weight acts on all positions of a window at once.  Attention mixes positions, so their gradients are not
independent.  ``coupled`` is an f that accounts for this: ``E[‖G_o‖²] / (T · tr H)``, with G_o the gradient of the NLL
of a window of T tokens in row o of the weight.  It equals f if positions are independent.  ``coupled_inputs`` does the
same for H: ``E[GᵀG]``, scaled to the trace of H.

An expert of a mixture sees only the tokens routed to it, and an error in it costs nothing elsewhere.  Its H is
therefore multiplied by its traffic, the share of positions that it saw.  Likewise a block that is applied several times
counts as often, and the gradients of a window in its weight are added up before they are squared.

A model that is not judged by the NLL brings its own score, a scalar function of a window.  D is then the damage per
position, provided that the expected squared change of the score is twice the damage.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Integer
from torch import Tensor

from nashswarm.calibration.missing_moments import mean_of_siblings, no_moments
from nashswarm.calibration.moment_sums import MomentSums, add_inputs, mean_moments, start_gradients
from nashswarm.calibration.moments_table import MomentsTable, PackedMoments
from nashswarm.calibration.nll import Labels, summed_nll
from nashswarm.calibration.recomputation import recomputed_blocks
from nashswarm.memory import trim_heap
from nashswarm.models.evaluation import without_cache, without_padding
from nashswarm.progress import Track, no_track

Expected = Literal["even", "zipf"]
Score = Callable[[Any, Tensor, torch.Generator], Tensor]


@contextlib.contextmanager
def _moment_hooks(
    model: Any, names: Sequence[str], zipf: bool, known: Mapping[str, PackedMoments], recomputing: Callable[[], bool]
) -> Iterator[dict[str, MomentSums]]:
    """Collect the sums of these modules during the context, with the gradients of all parameters switched off."""
    head = model.get_output_embeddings()
    modules = {name: model.get_submodule(name) for name in names}
    embedding = model.get_input_embeddings()
    sums = {
        name: MomentSums(module, module is head, zipf and module in (head, embedding), known.get(name), recomputing)
        for name, module in modules.items()
    }
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [embedding.register_forward_hook(lambda *call: start_gradients(call[-1]))]
    handles += [part.module.register_forward_hook(part.add_inputs) for part in sums.values()]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with without_cache(model):
            yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_()


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Round the factors of matrix products to bfloat16 during the context, where the processor multiplies them.

    With AMX a product takes a third of the time, with AVX-512 BF16 half of it.  Sums stay in float32, so that a moment
    moves by far less than from one sample of text to the next.  On other processors products stay as they are.
    """
    before = torch.get_float32_matmul_precision()
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def calibrate(
    model: Any,
    names: Sequence[str],
    windows: Integer[Tensor, "windows length"],
    generator: torch.Generator,
    labels: Labels = "model",
    track: Track = no_track,
    score: Score | None = None,
    expected: Expected = "even",
    rounded: bool = False,
    known: MomentsTable | None = None,
) -> MomentsTable:
    """Compute the moments of the modules in ``names``, averaged over all positions of ``windows``.

    ``labels`` are sampled from the model (``"model"``, for the true Fisher information) or taken from the text
    (``"text"``, for the empirical one).  ``score``, a function of model, window and generator, replaces the NLL as the
    scalar whose gradient is taken.  ``expected``: how frequent tokens are of which the windows say nothing, ``even`` as
    in records of older methods, or by Zipf's law (``token_frequencies``).  ``rounded``: whether the factors of products
    may be rounded to bfloat16 (``bfloat16_products``).

    ``known``: moments whose inputs stay, so that gradients alone are computed; those of a module that these windows do
    not use stay altogether.

    Raises ValueError for a module that the model never uses.
    """
    score = score or functools.partial(summed_nll, labels=labels)
    model.eval()
    fast = bfloat16_products() if rounded and windows.device.type == "cpu" else contextlib.nullcontext()
    given = {} if known is None else known.data
    with (
        recomputed_blocks(model) as recomputing,
        _moment_hooks(model, names, expected == "zipf", given, recomputing) as sums,
        fast,
    ):
        for number, window in enumerate(track(list(windows), "calibrating")):
            scalar = score(model, window, generator)
            add_inputs(sums.values())
            scalar.backward()
            del scalar  # and its graph, before the next one grows
            for part in sums.values():
                part.end_window()
            if not number:  # later windows take the memory of the one before; new pages would take a third of the time
                trim_heap()
    tokens = sum(len(without_padding(model, window)) for window in windows)
    table, used = mean_moments(sums, tokens), {name: part for name, part in sums.items() if part.used}
    table.data.update({name: moments for name, moments in given.items() if name in sums and name not in used})
    for name, part in sums.items():
        if part.routed and name not in table.data:
            table[name] = mean_of_siblings(name, table, {name: part.positions for name, part in used.items()})
    for name in [name for name in names if name not in table]:
        module = model.get_submodule(name)
        if any(sums[other].module.weight is module.weight for other in used):
            table[name] = no_moments(module)  # the matrix is used under other names
    if unused := [name for name in names if name not in table]:
        raise ValueError(f"the model never uses {', '.join(unused)}: leave them out by model.exclude")
    return table
