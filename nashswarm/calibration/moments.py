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
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from nashswarm.calibration.missing_moments import mean_of_siblings, no_moments
from nashswarm.calibration.moments_table import MomentsTable, PackedMoments, SymmetricMatrix
from nashswarm.calibration.nll import Labels, summed_nll
from nashswarm.calibration.recomputation import recomputed_blocks
from nashswarm.calibration.token_frequencies import smoothed
from nashswarm.memory import trim_heap
from nashswarm.models.evaluation import without_cache, without_padding
from nashswarm.progress import Track, no_track

Expected = Literal["even", "zipf"]
Score = Callable[[Any, Tensor, torch.Generator], Tensor]


class _MomentSums:
    """Running sums of one module, updated by hooks, on the CPU: matrices in float32, vectors in float64.

    ``head``: whether its outputs are the logits of tokens.  ``zipf``: whether its rows are of tokens.  ``known``: the
    moments whose inputs stay, so that gradients alone are summed.  ``recomputing``: whether the module is called only
    to have its activations again.  ``calls``: its inputs in the present window.
    Modules that had the same inputs in all windows share ``inputs``.
    """

    def __init__(
        self, module: nn.Module, head: bool, zipf: bool, known: PackedMoments | None, recomputing: Callable[[], bool]
    ) -> None:
        self.module, self.head, self.zipf, self.known, self.recomputing = module, head, zipf, known, recomputing
        self.routed: bool = getattr(module, "routed", False)  # a matrix of one expert
        self.positions = 0
        self.calls: list[Tensor] = []
        self.inputs: SymmetricMatrix | None = None
        self.energy = 0.0  # of the inputs: the sum of their squares
        self.counts: Tensor | None = None
        self.outputs: Tensor | None = None
        self.rows: Tensor | None = None
        self.columns: SymmetricMatrix | None = None
        self.awaited = 0
        self.weight_gradient: Tensor | None = None

    def add_inputs(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """Forward hook: keep the inputs, and register a hook on the gradient of the output."""
        if not torch.is_grad_enabled():
            return output
        if isinstance(module, nn.Embedding) or not output.requires_grad:
            output = start_gradients(output)  # in both passes: a block must keep the same tensors in both
        if self.recomputing():
            return output
        held: list[Tensor] = []
        if isinstance(module, nn.Embedding):
            rows, positions = module.num_embeddings, output.numel() // output.shape[-1]
            if type(module).forward is nn.Embedding.forward:
                counts = torch.bincount(arguments[0].flatten().cpu(), minlength=rows).double()
            else:  # a position table that computes its own indices: count all rows alike
                counts = torch.full((rows,), positions / rows, dtype=torch.float64)
            self.counts = counts if self.counts is None else self.counts.add_(counts)
        else:
            inputs = arguments[0].detach()
            positions = inputs.numel() // inputs.shape[-1]
            if self.known is None:
                self.calls.append(inputs)
            else:
                self.energy += float(torch.linalg.vector_norm(inputs.float()).square())
            if not self.head:
                held.append(inputs)
                self.awaited += 1
        self.positions += positions
        output.register_hook(functools.partial(self.add_gradient, held))
        return output

    def add_gradient(self, held: list[Tensor], gradient: Tensor) -> None:
        """Backward hook: add the squared gradients of the outputs, and the gradient of the weight.

        ``held``: the inputs, which are let go.
        """
        gradients = _by_position(gradient.detach())
        self.outputs = _add(self.outputs, gradients.square().sum(0))
        if held:
            part = gradients.T @ _by_position(held.pop())
            self.weight_gradient = part if self.weight_gradient is None else self.weight_gradient.add_(part)
            self.awaited -= 1
            if not self.awaited:
                self.end_window()

    def end_window(self) -> None:
        """Add the squared gradients of the rows and columns of the weight, over all calls in the window."""
        if self.weight_gradient is not None:
            self.rows = _add(self.rows, torch.linalg.vector_norm(self.weight_gradient, dim=1).square())
            if self.known is None:
                if self.columns is None:
                    self.columns = SymmetricMatrix.zeros(self.weight_gradient.shape[1])
                self.columns.add_gram(self.weight_gradient)
        self.awaited, self.weight_gradient = 0, None

    def moments(self, tokens: int) -> PackedMoments:
        """Return the means, of inputs over all ``tokens`` and of squared gradients over the positions of the module.

        A module that is called several times for each token, or for one token of a window, therefore counts as often as
        an error in it acts.  ``inputs`` are a mean already.

        The counts of an embedding and the squared gradients of the output head are smoothed: otherwise
        errors in tokens that calibration text does not contain would cost nothing.
        """
        assert self.outputs is not None
        outputs = (self.outputs / self.positions).float()
        if self.head:
            outputs = smoothed(self.outputs, self.positions, self.zipf).float()
        if self.known is not None:
            rows = None if self.rows is None else (self.rows / max(self.energy, torch.finfo().tiny)).float()
            return dataclasses.replace(self.known, outputs=outputs, coupled=outputs if rows is None else rows)
        if self.inputs is None:
            assert self.counts is not None
            shares = (smoothed(self.counts, self.positions, self.zipf) * (self.positions / tokens)).float()
            return PackedMoments(shares, outputs, outputs, shares)
        if self.rows is None or self.columns is None:
            return PackedMoments(self.inputs, outputs, outputs, self.inputs)
        trace, gradient = self.inputs.trace(), self.columns.trace()
        if not trace or not gradient:  # no inputs, or no gradients
            return PackedMoments(self.inputs, outputs, torch.zeros_like(outputs), self.inputs)
        self.columns.entries.mul_(trace / gradient)
        return PackedMoments(self.inputs, outputs, (self.rows / (tokens * trace)).float(), self.columns)


def start_gradients(output: Tensor) -> Tensor:
    """Return the values of ``output`` as a tensor from which gradients are taken, and which may be changed in place."""
    return output.detach().requires_grad_().clone()


def _by_position(values: Tensor) -> Float[Tensor, "positions width"]:
    return values.float().flatten(0, -2)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part.cpu().double() if total is None else total.add_(part.cpu())


def _add_inputs(sums: Iterable[_MomentSums]) -> None:
    """Add the inputs of a window, once for all modules that always had the same ones."""
    groups: dict[tuple[Any, ...], list[_MomentSums]] = {}
    for part in sums:
        if part.calls or part.inputs is not None:
            seen = (
                id(part.inputs),
                part.routed,
                *((call.data_ptr(), call.shape, call.stride()) for call in part.calls),
            )
            groups.setdefault(seen, []).append(part)
    shared: set[int] = set()
    for (before, *_), group in groups.items():
        total = group[0].inputs
        if total is None:
            total = SymmetricMatrix.zeros(group[0].calls[0].shape[-1])
        elif before in shared:  # no longer the same inputs
            total = total.clone()
        shared.add(before)
        for part in group:
            part.inputs = total
    for group in groups.values():
        for call in group[0].calls:
            assert group[0].inputs is not None
            group[0].inputs.add_gram(_by_position(call))
        for part in group:
            part.calls.clear()


@contextlib.contextmanager
def _moment_hooks(
    model: Any, names: Sequence[str], zipf: bool, known: Mapping[str, PackedMoments], recomputing: Callable[[], bool]
) -> Iterator[dict[str, _MomentSums]]:
    """Collect the sums of these modules during the context, with the gradients of all parameters switched off."""
    head = model.get_output_embeddings()
    modules = {name: model.get_submodule(name) for name in names}
    embedding = model.get_input_embeddings()
    sums = {
        name: _MomentSums(module, module is head, zipf and module in (head, embedding), known.get(name), recomputing)
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
def _bfloat16_products() -> Iterator[None]:
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
    may be rounded to bfloat16 (``_bfloat16_products``).

    ``known``: moments whose inputs stay, so that gradients alone are computed; those of a module that these windows do
    not use stay altogether.

    Raises ValueError for a module that the model never uses.
    """
    score = score or functools.partial(summed_nll, labels=labels)
    model.eval()
    fast = _bfloat16_products() if rounded and windows.device.type == "cpu" else contextlib.nullcontext()
    given = {} if known is None else known.data
    with (
        recomputed_blocks(model) as recomputing,
        _moment_hooks(model, names, expected == "zipf", given, recomputing) as sums,
        fast,
    ):
        for number, window in enumerate(track(list(windows), "calibrating")):
            scalar = score(model, window, generator)
            _add_inputs(sums.values())
            scalar.backward()
            del scalar  # and its graph, before the next one grows
            for part in sums.values():
                part.end_window()
            if not number:  # later windows take the memory of the one before; new pages would take a third of the time
                trim_heap()
    table, means = MomentsTable(), set[int]()
    tokens = sum(len(without_padding(model, window)) for window in windows)
    used = {name: part for name, part in sums.items() if part.positions and part.outputs is not None}
    for name, part in used.items():
        if part.inputs is not None and id(part.inputs) not in means:
            part.inputs.entries.div_(tokens)
            means.add(id(part.inputs))
        table.data[name] = part.moments(tokens)
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
