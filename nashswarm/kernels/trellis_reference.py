"""Reference implementations for trellis-coded matrices in plain torch: slow, and what the others are tested against.

With int8 activations, a row of x is put into the stored order of columns, multiplied by the column scales, and rounded
as ``reference.round_activations`` does, 64 columns at a time.
"""

from jaxtyping import Float, Integer
from torch import Tensor

from nashswarm.kernels import tiles as layout
from nashswarm.kernels import trellis as form
from nashswarm.kernels.reference import round_activations
from nashswarm.kernels.trellis import Trellis

ROUNDED = 64  # columns whose activations are rounded with one step


def matmul(x: Float[Tensor, "batch columns"], trellis: Trellis, activations: str) -> Float[Tensor, "batch rows"]:
    """Compute x Wᵀ for x of float32."""
    on_cpu = form.parse(trellis.content.cpu())
    weight = form.dequantize(on_cpu).to(x.device)
    if activations == "int8":
        order = form.orders_of(on_cpu)[1].to(x.device)
        scale = form.scales(on_cpu.column_scale, form.COLUMN_STEPS)[: trellis.columns].to(x.device)
        x, weight = round_activations(x[:, order] * scale, ROUNDED), weight[:, order] / scale
    return x @ weight.T


def rows_of(trellis: Trellis, ids: Integer[Tensor, " count"]) -> Float[Tensor, "count columns"]:
    """Return the rows ``ids`` of the dequantized matrix.

    Raises IndexError for a row that does not exist, if ``ids`` are on the CPU.
    """
    if ids.is_cpu and ((ids < 0) | (ids >= trellis.rows)).any():
        raise layout.missing_row(trellis.rows, int(ids[(ids < 0) | (ids >= trellis.rows)][0]))
    return form.dequantize(form.parse(trellis.content.cpu())).to(ids.device)[ids]
