"""The audit as a document: all claims and the table of sizes, in Markdown, in LaTeX, and as the parts of the paper."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from nashswarm.methods.nash_lattice.settings import NashLattice
from nashswarm.models.shapes import ParameterCounts, class_entropy
from nashswarm.quant.prototype import CLASS_BITS
from nashswarm.reporting import typeset
from nashswarm.reporting.audit import game_claims, quality_claims, time_claims
from nashswarm.reporting.audit.claim import FAILS, HOLDS, LATER, Claim, megabytes, percent
from nashswarm.reporting.audit.evidence import Evidence
from nashswarm.reporting.formats import fixed
from nashswarm.reporting.latex import ESCAPES, commands, macro_name, table_row, tabular, tex_heading

HEADINGS = ("", "claim as published", "its protocol, run here", "honest measure", "holds if", "verdict", "on GPT-2")
SIZE_HEADINGS = (
    "model",
    "parameters",
    "MB, 32-bit",
    "quantized %",
    "counted: saved %",
    "file, classes free: saved %",
    "classes by entropy: saved %",
    "classes stored: saved %",
    "MB, classes stored",
    "MB of `nash_lattice`",
    "saved %",
)
SIZE_COLUMNS = f"@{{}}l{'r' * (len(SIZE_HEADINGS) - 1)}@{{}}"
MAKERS: tuple[Callable[[Evidence], Claim], ...] = (  # C1 to C12
    quality_claims.size,
    quality_claims.quality,
    time_claims.latency,
    quality_claims.small,
    time_claims.routing,
    time_claims.faster,
    game_claims.components,
    game_claims.equilibrium,
    time_claims.cache,
    quality_claims.scale,
    game_claims.novelty,
    quality_claims.helps,
)
SIGNS = {"×": r"$\times$", "−": "$-$", "→": r"$\to$", "–": "--", "µ": r"\textmu{}", "≥": r"$\geq$"}
TEX = ESCAPES | str.maketrans(SIGNS)


def claims(evidence: Evidence) -> list[Claim]:
    """Return all twelve claims in their order."""
    return [make(evidence) for make in MAKERS]


def size_rows(sizes: Mapping[str, ParameterCounts]) -> list[tuple[str, ...]]:
    """Return a row per shape: the published scheme, and ``nash_lattice`` at its budget."""
    bits = NashLattice().bits
    count = fixed(0)
    return [
        (
            f"`{name}`",
            count(shape.parameters),
            megabytes(shape.bytes_full),
            percent(shape.share),
            percent(shape.compression_counted),
            *(percent(shape.compression(class_bits)) for class_bits in (0, class_entropy(), CLASS_BITS)),
            megabytes(shape.bytes_prototype(CLASS_BITS)),
            megabytes(shape.bytes_at(bits)),
            percent(1 - shape.bytes_at(bits) / shape.bytes_full),
        )
        for name, shape in sizes.items()
    ]


def markdown(evidence: Evidence) -> str:
    """Return both tables in Markdown, with a sentence between them."""
    rows = [claim.cells() for claim in claims(evidence)]
    lines = typeset.markdown_lines(HEADINGS, rows, [":--"] * len(HEADINGS))
    alignment = [":--"] + ["--:"] * (len(SIZE_HEADINGS) - 1)
    lines += [
        "",
        f"Sizes, exact from shapes alone, weights untouched; `nash_lattice` at {NashLattice().bits} stored bits per "
        "parameter, its budget:",
        "",
        *typeset.markdown_lines(SIZE_HEADINGS, size_rows(evidence.sizes), alignment),
    ]
    return "\n".join(lines) + "\n"


def latex(evidence: Evidence) -> str:
    """Return both tables as LaTeX ``tabular`` environments; the paper writes the captions."""
    alignment = "@{}lp{.17\\linewidth}p{.25\\linewidth}p{.27\\linewidth}p{.12\\linewidth}l@{}"
    rows = [claim.cells()[:-1] for claim in claims(evidence)]
    sizes = escaped_table(SIZE_COLUMNS, SIZE_HEADINGS, size_rows(evidence.sizes))
    return escaped_table(alignment, HEADINGS[:-1], rows) + "\n" + sizes


def included(evidence: Evidence) -> dict[str, str]:
    """Return the parts of the paper by file name: all claims, their verdicts alone, sizes, and counts of verdicts."""
    rows = claims(evidence)
    verdicts = [row.verdict() for row in rows]
    counts = {
        macro_name("audit", "claims"): len(rows),
        macro_name("audit", "holds"): sum(verdict.startswith(HOLDS) for verdict in verdicts),
        macro_name("audit", "fails"): sum(verdict.startswith(FAILS) for verdict in verdicts),
        macro_name("audit", "open"): sum(verdict == LATER for verdict in verdicts),
    }
    short = [(row.name, row.claim, row.verdict()) for row in rows]
    return {
        "audit_claims": "".join(
            rf"\claim{''.join(f'{{{escaped(cell)}}}' for cell in row.cells()[:-1])}" + "\n" for row in rows
        ),
        "audit_verdicts": escaped_table(r"@{}lp{.66\linewidth}l@{}", ("", HEADINGS[1], HEADINGS[5]), short),
        "audit_sizes": escaped_table(SIZE_COLUMNS, SIZE_HEADINGS, size_rows(evidence.sizes), stacked),
        "audit_numbers": commands({name: str(count) for name, count in counts.items()}),
    }


def escaped(cell: str) -> str:
    """Return a cell in LaTeX, without the backquotes of Markdown."""
    return cell.replace("`", "").translate(TEX)


def stacked(heading: str) -> str:
    """Return a heading in LaTeX, one word below the other."""
    return tex_heading(heading.replace("`", ""))


def escaped_table(
    alignment: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    heading: Callable[[str], str] = escaped,
) -> str:
    """Return a ``tabular`` of cells that are plain text."""
    return tabular(alignment, [table_row(map(heading, headings))], [map(escaped, row) for row in rows])
