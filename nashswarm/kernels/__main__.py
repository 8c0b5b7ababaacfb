"""Measure the speed of a product with a packed matrix, and print it as a line of JSON:

    python -m nashswarm.kernels --shape 3072x768 --bits 3 --group-size 64 --batch 1 --threads 1 --activations int8
    python -m nashswarm.kernels --shape 3072x768 --bits 3 --trellis

``microseconds`` is the raw call of the library, ``microseconds_op`` is ``kernels.matmul`` (what modules call), and
``microseconds_fp32`` is torch's product with floats.  All are medians over rounds in which the three take turns, with
the weights in the CPU cache.  ``ratio`` is the median over rounds of the third to the first, with a 95 % interval;
``ratio_op`` is that of the third to the second.  ``relative_error`` compares with float64 products of the same weights.

With ``--trellis`` they are those of a trellis-coded matrix, whose tiles have these bits as their rates, and
``ratio_to_plain`` compares it with plain tiles of the same bits (``microseconds_plain``), which take turns with it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nashswarm import kernels
from nashswarm.kernels import native, trellis_native
from nashswarm.kernels import tiles as layout
from nashswarm.kernels import trellis as form
from nashswarm.kernels import trellis_codes as codes
from nashswarm.kernels.tiles import Tiles
from nashswarm.kernels.trellis import Trellis
from nashswarm.records.statistics import median_interval

MIXED = (2, 3, 4)
ROUNDS = 61
SECONDS = 2e-3  # that each call is repeated for in a round


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse ``arguments`` (default: the command line), measure, and print the line."""
    parser = argparse.ArgumentParser(prog="python -m nashswarm.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=_shape, default=(3072, 768), metavar="OUTxIN")
    parser.add_argument("--bits", type=_widths, default=(3,), metavar="BITS", help="a width, several, or: mixed")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--lattice", action="store_true", help="scales of rows and columns instead of groups")
    parser.add_argument("--trellis", action="store_true", help="a trellis-coded matrix beside the tiles")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--activations", choices=kernels.ACTIVATIONS, default="int8")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    if options.group_size % layout.CHUNK:
        parser.error(f"--group-size {options.group_size}: kernels read groups of multiples of {layout.CHUNK}")
    torch.set_num_threads(options.threads)
    rows, columns = options.shape
    tiles = example(rows, columns, options.bits, options.group_size, options.lattice)
    trellis = example_trellis(rows, columns, options.bits) if options.trellis else None
    print(json.dumps(measure(trellis or tiles, options.batch, options.activations, options.rounds, tiles)))


def example(rows: int, columns: int, bits: Sequence[int], group_size: int, lattice: bool, seed: int = 0) -> Tiles:
    """Make a matrix of normally distributed codes, with the width of each tile drawn at random from ``bits``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (-(-rows // layout.TILE_ROWS), -(-columns // group_size))
    widths = torch.tensor(bits)[torch.randint(len(bits), shape, generator=generator)].to(torch.uint8)
    levels = 2.0 ** widths.float().view(-1, 1, 1)
    codes = torch.randn(widths.numel(), layout.TILE_ROWS, group_size, generator=generator) * levels / 5 + levels / 2
    codes = codes.floor().clamp(min=0).minimum(levels - 1).to(torch.uint8)
    none = torch.zeros(0)
    side = (0,) if lattice else (*shape, layout.TILE_ROWS)
    scale = (torch.rand(side, generator=generator) * 0.01 + 0.01).half()
    zero_point = none if lattice else levels.view(*shape, 1) / 2 + torch.randint(-1, 2, side, generator=generator)
    across, down = (torch.rand(n, generator=generator) + 0.5 if lattice else none for n in (rows, columns))
    escapes = [torch.zeros(n, dtype=torch.int32) for n in (shape[0] + 1, 0, 0)]
    payload = layout.pack(codes, widths.flatten())
    return Tiles(rows, columns, group_size, payload, widths, scale, zero_point.to(torch.uint8), across, down, *escapes)


def example_trellis(rows: int, columns: int, bits: Sequence[int], seed: int = 0) -> Trellis:
    """Make a matrix of random codes and scales in random orders, with the rate of each tile drawn from ``bits``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (form.groups_of(rows), form.tiles_across(columns))
    rates = torch.tensor(bits)[torch.randint(len(bits), shape, generator=generator)]
    stored = (shape[0] * codes.ROWS, shape[1] * codes.COLUMNS)
    drawn = torch.randint(1 << 8, stored, generator=generator)
    each = rates.repeat_interleave(codes.ROWS, 0).repeat_interleave(codes.COLUMNS, 1)
    sizes, across, down = (
        torch.randint(low, high, (count,), generator=generator).to(torch.uint8)
        for low, high, count in ((0, 4, stored[0]), (120, 137, stored[1]), (120, 137, rows))
    )
    orders = [torch.randperm(size, generator=generator) for size in (rows, columns)]
    values = (drawn % (1 << each)).to(torch.uint8)
    return form.build(rates.to(torch.uint8), values, rows, columns, True, 0.01, sizes, down, across, *orders)


def measure(matrix: Tiles | Trellis, batch: int, activations: str, rounds: int, tiles: Tiles) -> dict[str, str | float]:
    """Measure products of ``batch`` random rows with the matrix; return the fields of the line.

    ``tiles`` of the same width are measured beside a trellis-coded matrix.
    """
    x = torch.randn(batch, matrix.columns, generator=torch.Generator().manual_seed(1))
    weight = form.dequantize(matrix) if isinstance(matrix, Trellis) else layout.dequantize(matrix)
    exact = x.double() @ weight.double().T
    product = kernels.direct(x, matrix, activations).double()
    calls: list[Callable[[], Tensor]] = [
        lambda: fastest_call(matrix)(x, matrix, activations, None),
        lambda: kernels.matmul(x, matrix, activations),
        lambda: torch.nn.functional.linear(x, weight),
    ]
    if isinstance(matrix, Trellis):
        calls.append(lambda: fastest_call(tiles)(x, tiles, activations, None))
    raw, operator, floats, *others = interleaved(calls, rounds)
    fields: dict[str, str | float] = {
        "path": native.path(),
        "microseconds": round(1e6 * statistics.median(raw), 2),
        "microseconds_op": round(1e6 * statistics.median(operator), 2),
        "microseconds_fp32": round(1e6 * statistics.median(floats), 2),
    }
    for plain in others:
        fields["microseconds_plain"] = round(1e6 * statistics.median(plain), 2)
        fields |= _ratio("ratio_to_plain", raw, plain)
    fields |= _ratio("ratio", floats, raw)
    return fields | {
        "ratio_op": round(statistics.median(b / a for a, b in zip(operator, floats, strict=True)), 3),
        "relative_error": float(f"{float((product - exact).norm() / exact.norm()):.3g}"),
        "bits_per_weight": round(8 * matrix.nbytes / matrix.rows / matrix.columns, 3),
    }


def _ratio(name: str, above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the median ratio over rounds, and its interval."""
    ratios = [first / second for first, second in zip(above, below, strict=True)]
    low, high = median_interval(ratios)
    return {name: round(statistics.median(ratios), 3), f"{name}_low": round(low, 3), f"{name}_high": round(high, 3)}


def fastest_call(matrix: Tiles | Trellis | None = None) -> Callable[..., Tensor]:
    """Return the function that computes a product with the least overhead."""
    if native.path() == native.SLOW:
        return kernels.direct
    return trellis_native.matmul if isinstance(matrix, Trellis) else native.matmul


def interleaved(calls: Sequence[Callable[[], Tensor]], rounds: int) -> list[list[float]]:
    """Return the seconds of each call in each round.  In a round the calls take turns, for equal times."""
    with torch.inference_mode():
        counts = []
        for call in calls:
            seconds = min(_seconds(call, 3) for _ in range(5))
            counts.append(max(1, round(SECONDS / seconds)))
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, count, seconds_by_round in zip(calls, counts, times, strict=True):
                _seconds(call, 3)  # loads the weights into the CPU cache
                seconds_by_round.append(_seconds(call, count))
    return times


def _seconds(call: Callable[[], Tensor], count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def _shape(text: str) -> tuple[int, int]:
    rows, columns = (int(part) for part in text.split("x"))
    return rows, columns


def _widths(text: str) -> tuple[int, ...]:
    widths = MIXED if text == "mixed" else tuple(int(part) for part in text.split(","))
    if set(widths) - set(layout.WIDTHS):
        raise argparse.ArgumentTypeError(f"{text}: widths are {', '.join(map(str, layout.WIDTHS))}")
    return widths


if __name__ == "__main__":
    main()
