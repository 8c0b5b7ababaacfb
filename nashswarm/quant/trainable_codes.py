"""Codes that can be trained: real numbers that stand for the codes they round to, by straight-through estimation.

A weight is ``(round(u) − z) · step · exp(s)``.  Its gradient reaches the latent code u as if nothing had been rounded
(Bengio, Léonard & Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013), and s, the
logarithm of what a scale is multiplied by, as it is (Esser et al., "Learned Step Size Quantization", 2020).  Of a
lattice s is one number, its base; elsewhere one a group.  The grid keeps its shape: row and column scales of a lattice,
zero points and widths of groups stay as they are.  Where an entropy coder stores the codes, their length has a slope
too, linear between whole numbers.
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

CODES = 1 << max(GRID_WIDTHS)  # kinds of codes that a group may have
REACH = 0.45  # how far from its code, in steps, a latent one starts toward the full weight: short of rounding elsewhere


class TrainableCodes:
    """A stored matrix while it is trained; ``codes`` (out, groups, group size; of a lattice one group) and ``scale``
    (1, 1, 1 or out, groups, 1) are its parameters.  ``tables``: of a lattice.  ``coded``: whether an entropy coder
    stores it."""

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
            self.address, self.table = tensor.lattice.levels(), tables
            scales = (1, 1, 1)
        else:
            step, zero = tensor.scale.float().unsqueeze(-1), tensor.zero_point.float().unsqueeze(-1)
            widths = tensor.bits.repeat_interleave(TILE_ROWS, 0)[:rows].unsqueeze(-1)
            trained = torch.isin(widths.int(), torch.tensor(GRID_WIDTHS))
            self.low, self.high = torch.zeros(1, device=device), (2.0 ** widths.float() - 1).to(device)
            self.address, self.table = widths.long(), _lengths_of_groups(tensor)
            scales = (rows, groups, 1)
        self.step, self.zero, self.trained = (part.to(device) for part in (step, zero, trained))
        self.address = self.address.to(device)
        self.start = tensor.codes.float().view(self.shape).to(device)
        self.kept = torch.where(trained, 0.0, tensor.dequantize().view(self.shape)).to(device)
        whole = (weight.to(device).view(self.shape) / torch.where(self.step == 0, 1, self.step)) + self.zero
        toward = torch.where(self.trained, (whole - self.start).clamp(-REACH, REACH), 0)
        self.origin = self.clamped(self.start + toward)
        self.codes = nn.Parameter(self.origin.clone())
        self.scale = nn.Parameter(torch.zeros(scales, device=device))

    def clamped(self, codes: Tensor) -> Tensor:
        """Codes within the grid of their group; a lattice has no end."""
        return codes if self.low is None or self.high is None else codes.maximum(self.low).minimum(self.high)

    @torch.no_grad()
    def clamp_codes(self) -> None:
        """Bring latent codes that a step took off their grid back to its ends."""
        self.codes.copy_(torch.where(self.trained, self.clamped(self.codes), self.origin))

    @torch.no_grad()
    def weight(self) -> Float[Tensor, "out in"]:
        """What the matrix would be if it were stored now."""
        values = (self.codes.round() - self.zero) * self.step * self.scale.exp() + self.kept
        return values.view(self.tensor.codes.shape)

    @torch.no_grad()
    def backpropagate(self, gradient: Float[Tensor, "out in"], price: float) -> None:
        """Hand the gradient of the loss in the weights on to the parameters; ``price``: of a bit, in the loss."""
        own = torch.where(self.trained, gradient.view(self.shape), 0)
        factor = self.step * self.scale.exp()
        self.codes.grad = own * factor
        self.scale.grad = ((self.codes.round() - self.zero) * factor * own).sum_to_size(self.scale.shape)
        if price and self.coded:
            below = self.codes.floor()
            slope = self.bits(self.clamped(below + 1)) - self.bits(below)
            self.codes.grad += price * torch.where(self.trained, slope, 0)

    def bits(self, codes: Float[Tensor, "out groups group_size"]) -> Float[Tensor, "out groups group_size"]:
        """The length of every code where an entropy coder stores it, by the tables at the start."""
        if isinstance(self.table, CodeTables):
            return code_lengths(codes.view(self.tensor.codes.shape).int(), self.address, self.table).view(self.shape)
        return self.table.to(self.device).take(self.address * CODES + codes.long().clamp(0, CODES - 1))

    @torch.no_grad()
    def lengthened_codes(self) -> tuple[Float[Tensor, " moves"], Float[Tensor, " moves"]]:
        """Of all codes that moved and became longer: how far their latent codes went, in steps, and by how many bits
        they grew."""
        grown = torch.where(self.trained, self.bits(self.codes.round()) - self.bits(self.start), 0)
        longer = grown > 0
        return (self.codes - self.origin).abs()[longer], grown[longer]

    @torch.no_grad()
    def quantized(self, least: float) -> LatticeTensor | QuantizedTensor:
        """The tensor with its codes rounded; those that grew longer without going further than ``least`` steps stay as
        they were."""
        codes = self.codes.round()
        if least > 0:
            grown = self.bits(codes) > self.bits(self.start)
            codes = torch.where(grown & ((self.codes - self.origin).abs() <= least), self.start, codes)
        codes = torch.where(self.trained, codes, self.start).view(self.tensor.codes.shape).cpu()
        factor = self.scale.exp().cpu()
        if isinstance(self.tensor, LatticeTensor):
            lattice = self.tensor.lattice
            base = float(torch.tensor(lattice.base, dtype=torch.float32) * factor.flatten()[0])
            return LatticeTensor(codes.int(), dataclasses.replace(lattice, base=base))
        trained = self.trained.view(self.tensor.codes.shape[0], -1, 1).cpu().expand(self.shape)
        kept = self.tensor.codes.view(self.shape)
        whole = torch.where(trained, codes.view(self.shape).to(kept.dtype), kept).view(codes.shape)
        scale = (self.tensor.scale.float() * factor[..., 0]).half()
        return dataclasses.replace(self.tensor, codes=whole, scale=scale)


def encode_tensors(
    tensors: Mapping[str, LatticeTensor | QuantizedTensor], coded: Mapping[str, bool], tables_name: str
) -> dict[str, UInt8[np.ndarray, " _"]]:
    """The stored bytes of every matrix and, under ``tables_name``, of the tables that fit all lattices together."""
    lattices = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, LatticeTensor)}
    tables = fit_tables(count_symbols(lattices.values()))
    found = {name: encode_lattice(tensor, tables) for name, tensor in lattices.items()}
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            found[name] = encode_groups(tensor) if coded[name] else pack(tensor)
    return found | ({tables_name: tables.pack()} if lattices else {})


def _lengths_of_groups(tensor: QuantizedTensor) -> Float[Tensor, "widths codes"]:
    """Bits of every code in tiles of every width, by how often it occurs there."""
    widths = tensor.bits.repeat_interleave(TILE_ROWS, 0)[: len(tensor.codes)].long()
    each = widths.repeat_interleave(tensor.scheme.group_size, 1)
    chosen = torch.isin(each, torch.tensor(GRID_WIDTHS))
    found: Integer[Tensor, " kinds"] = torch.bincount(
        (each * CODES + tensor.codes.long())[chosen], minlength=(max(WIDTHS) + 1) * CODES
    )
    counts = found.view(-1, CODES).float() + 0.5
    return -(counts / counts.sum(1, keepdim=True)).log2()
