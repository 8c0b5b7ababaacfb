"""Codes that are trained by gradient descent, with a straight-through estimate of the gradient of rounding.

A weight is ``(round(u) − z) · step · exp(s)``.  The latent code u is a real number, and its gradient is taken as if it
were not rounded (Bengio, Léonard & Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013).
The gradient of s, the logarithm of a factor of the step, is exact (Esser et al., "Learned Step Size Quantization",
2020).  A lattice has one s; other matrices have one for each group.  Everything else about the grid is fixed: row and
column scales of a lattice, zero points and widths of groups.  Where codes are entropy-coded, their length has a
gradient too: it is interpolated linearly between integers.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn

from nashswarm.quant.entropy import CodeTables, code_lengths, count_symbols, encode_groups, encode_lattice, fit_tables
from nashswarm.quant.grid import GRID_WIDTHS, TILE_ROWS, WIDTHS, QuantizedTensor
from nashswarm.quant.lattice import LatticeTensor
from nashswarm.quant.pack import pack

CODES = 1 << max(GRID_WIDTHS)  # number of different codes in a group
REACH = 0.45  # steps that a latent code may start away from its code, toward the full weight: rounding still undoes it


class TrainableCodes:
    """A quantized matrix whose codes and steps are trained.

    The parameters are ``codes`` (u), of shape (out, groups, group_size) with one group for a lattice, and ``scale``
    (s), of shape (1, 1, 1) for a lattice and (out, groups, 1) otherwise.  ``weight`` is the full-precision matrix,
    toward which latent codes start.  ``coded`` says whether the codes are entropy-coded.  ``tables`` are the code
    tables of a lattice.
    """

    def __init__(
        self,
        tensor: LatticeTensor | QuantizedTensor,
        weight: Float[Tensor, "out in"],
        device: torch.device,
        coded: bool = True,
        tables: CodeTables | None = None,
    ) -> None:
        self.tensor, self.coded, self.device = tensor, coded, device
        rows = len(tensor.codes)
        groups = 1 if isinstance(tensor, LatticeTensor) else tensor.scale.shape[1]
        self.shape = (rows, groups, tensor.codes.shape[1] // groups)
        zero: Tensor
        self.table: CodeTables | Tensor
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        if isinstance(tensor, LatticeTensor):
            assert tables is not None
            step = tensor.lattice.row_steps()[:, None] * tensor.lattice.column_steps()
            step, zero, trained = step.view(self.shape), torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
            self.table_index, self.table = tensor.lattice.levels(), tables
            scales = (1, 1, 1)
        else:
            step, zero = tensor.scale.float().unsqueeze(-1), tensor.zero_point.float().unsqueeze(-1)
            widths = tensor.bits.repeat_interleave(TILE_ROWS, 0)[:rows].unsqueeze(-1)
            trained = torch.isin(widths.int(), torch.tensor(GRID_WIDTHS))
            self.low, self.high = torch.zeros(1, device=device), (2.0 ** widths.float() - 1).to(device)
            self.table_index, self.table = widths.long(), _group_code_bits(tensor)
            scales = (rows, groups, 1)
        self.step, self.zero, self.trained = (part.to(device) for part in (step, zero, trained))
        self.table_index = self.table_index.to(device)
        self.stored_codes = tensor.codes.float().view(self.shape).to(device)
        self.fixed_weight = torch.where(trained, 0.0, tensor.dequantize().view(self.shape)).to(device)
        target = (weight.to(device).view(self.shape) / torch.where(self.step == 0, 1, self.step)) + self.zero
        toward = torch.where(self.trained, (target - self.stored_codes).clamp(-REACH, REACH), 0)
        self.initial_codes = self.clamped(self.stored_codes + toward)
        self.codes = nn.Parameter(self.initial_codes.clone())
        self.scale = nn.Parameter(torch.zeros(scales, device=device))

    def clamped(self, codes: Tensor) -> Tensor:
        """Return codes clamped to the grids of their groups; codes of a lattice are unbounded."""
        return codes if self.low is None or self.high is None else codes.maximum(self.low).minimum(self.high)

    @torch.no_grad()
    def clamp_codes(self) -> None:
        """Clamp the latent codes to their grids, in place.  Call it after each optimizer step."""
        self.codes.copy_(torch.where(self.trained, self.clamped(self.codes), self.initial_codes))

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "out in"]:
        """Return the matrix with the latent codes rounded."""
        values = (self.codes.round() - self.zero) * self.step * self.scale.exp() + self.fixed_weight
        return values.view(self.tensor.codes.shape)

    @torch.no_grad()
    def backpropagate(self, gradient: Float[Tensor, "out in"], bit_price: float) -> None:
        """Set the gradients of the parameters, given the ``gradient`` of the loss in the weights.

        ``bit_price`` is what a bit of code length adds to the loss.
        """
        gradient = torch.where(self.trained, gradient.view(self.shape), 0)
        factor = self.step * self.scale.exp()
        self.codes.grad = gradient * factor
        self.scale.grad = ((self.codes.round() - self.zero) * factor * gradient).sum_to_size(self.scale.shape)
        if bit_price and self.coded:
            below = self.codes.floor()
            slope = self.code_bits(self.clamped(below + 1)) - self.code_bits(below)
            self.codes.grad += bit_price * torch.where(self.trained, slope, 0)

    def code_bits(self, codes: Float[Tensor, "out groups group_size"]) -> Float[Tensor, "out groups group_size"]:
        """Return the entropy-coded length of each code in bits, by the tables fitted to the initial codes."""
        if isinstance(self.table, CodeTables):
            return code_lengths(codes.view(self.tensor.codes.shape).int(), self.table_index, self.table).view(
                self.shape
            )
        return self.table.to(self.device).take(self.table_index * CODES + codes.long().clamp(0, CODES - 1))

    @torch.no_grad()
    def lengthened_codes(self) -> tuple[Float[Tensor, " moves"], Float[Tensor, " moves"]]:
        """Return how far the latent codes moved, in steps, and by how many bits their codes grew.

        Codes that did not become longer are left out.
        """
        growth = torch.where(self.trained, self.code_bits(self.codes.round()) - self.code_bits(self.stored_codes), 0)
        longer = growth > 0
        return (self.codes - self.initial_codes).abs()[longer], growth[longer]

    @torch.no_grad()
    def quantized(self, min_move: float) -> LatticeTensor | QuantizedTensor:
        """Return the tensor with its latent codes rounded.

        Codes that became longer although their latent code moved by no more than ``min_move`` steps stay as they were.
        """
        codes = self.codes.round()
        if min_move > 0:
            longer = self.code_bits(codes) > self.code_bits(self.stored_codes)
            codes = torch.where(
                longer & ((self.codes - self.initial_codes).abs() <= min_move), self.stored_codes, codes
            )
        codes = torch.where(self.trained, codes, self.stored_codes).view(self.tensor.codes.shape).cpu()
        factor = self.scale.exp().cpu()
        if isinstance(self.tensor, LatticeTensor):
            lattice = self.tensor.lattice
            base = float(torch.tensor(lattice.base, dtype=torch.float32) * factor.flatten()[0])
            return LatticeTensor(codes.int(), dataclasses.replace(lattice, base=base))
        trained = self.trained.view(self.tensor.codes.shape[0], -1, 1).cpu().expand(self.shape)
        stored = self.tensor.codes.view(self.shape)
        new_codes = torch.where(trained, codes.view(self.shape).to(stored.dtype), stored).view(codes.shape)
        scale = (self.tensor.scale.float() * factor[..., 0]).half()
        return dataclasses.replace(self.tensor, codes=new_codes, scale=scale)


def encode_tensors(
    tensors: Mapping[str, LatticeTensor | QuantizedTensor], coded: Mapping[str, bool], tables_name: str
) -> dict[str, UInt8[np.ndarray, " _"]]:
    """Return the stored bytes of each matrix and, under ``tables_name``, of tables fitted to all lattices together."""
    lattices = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, LatticeTensor)}
    tables = fit_tables(count_symbols(lattices.values()))
    packed = {name: encode_lattice(tensor, tables) for name, tensor in lattices.items()}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            packed[name] = encode_groups(tensor) if coded[name] else pack(tensor)
    return packed | ({tables_name: tables.pack()} if lattices else {})


def _group_code_bits(tensor: QuantizedTensor) -> Float[Tensor, "widths codes"]:
    """Return the length in bits of each code in tiles of each width, by how often it occurs there."""
    widths = tensor.bits.repeat_interleave(TILE_ROWS, 0)[: len(tensor.codes)].long()
    weight_widths = widths.repeat_interleave(tensor.scheme.group_size, 1)
    chosen = torch.isin(weight_widths, torch.tensor(GRID_WIDTHS))
    counts: Integer[Tensor, " kinds"] = torch.bincount(
        (weight_widths * CODES + tensor.codes.long())[chosen], minlength=(max(WIDTHS) + 1) * CODES
    )
    smoothed = counts.view(-1, CODES).float() + 0.5
    return -(smoothed / smoothed.sum(1, keepdim=True)).log2()
