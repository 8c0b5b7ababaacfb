"""The audit: what the earlier prototype claimed, its own protocol run again, and an honest measurement beside it.

    python scripts/audit.py --paper paper/generated

Every number comes from a record (``experiment=audit``, ``experiment=ablation``) or is exact from shapes; every verdict
follows from them by the rule in its row.  Writes Markdown and LaTeX.  With ``--paper`` the parts that the paper
includes go there, and runs from uncommitted or unknown code are refused.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from nashswarm.records import files, record
from nashswarm.reporting import frame, typeset
from nashswarm.reporting.audit.document import claims, included, latex, markdown
from nashswarm.reporting.audit.evidence import MISSES, gather


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path("results/records"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("results/tables"))
    parser.add_argument("--misses", type=pathlib.Path, default=MISSES, help="report of experiments.benchmarks.misses")
    parser.add_argument("--paper", type=pathlib.Path, help="also write the paper's tables here")
    options = parser.parse_args(arguments)
    try:
        evidence = gather(options.records, options.misses)
        if options.paper:
            frame.refuse_dirty(frame.frame(record.read_all(options.records)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for claim in claims(evidence):
        typeset.console().print(f"{claim.name} {claim.claim}", f"[bold]{claim.verdict()}[/bold]", sep=": ")
    files.write_whole(options.out / "audit.md", markdown(evidence).encode())
    files.write_whole(options.out / "audit.tex", latex(evidence).encode())
    for name, content in included(evidence).items() if options.paper else ():
        files.write_whole(options.paper / f"{name}.tex", content.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
