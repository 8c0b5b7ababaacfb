"""Pack the source of the paper for arXiv, or check the last build of the paper.

    python scripts/arxiv.py
    python scripts/arxiv.py --check

The package has the files of ``paper/`` that the last ``make paper`` read (``main.fls``), the bibliography as
``main.bbl``.  It is built once more from the package alone, without ``latexmk`` or BibTeX.  The same sources make the
same bytes.  ``--check`` prints what is wrong with the last build: overfull boxes, undefined references, a body of too
many pages.
"""

import argparse
import gzip
import io
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence

from nashswarm.records.files import write_whole

SOURCES = {".tex", ".bbl", ".pdf", ".png"}
MAIN = "main"
PASSES = 3  # of pdflatex, until references and the table of contents are stable
WARNED = re.compile(r"^Overfull|Warning.*(?:undefined|multiply defined|Rerun to get)", re.I)
WRAPPED = re.compile(r"^(.{79})\n", re.M)  # TeX breaks the lines of its log after 79 characters
PAGES = 10  # the most of the body, references and appendix not counted
END = re.compile(r"\\newlabel\{end:body\}\{\{[^{}]*\}\{(\d+)\}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", type=pathlib.Path, default=pathlib.Path("paper"))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/arxiv/nashswarm.tar.gz"))
    parser.add_argument("--check", action="store_true", help="only check the last build")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            check(options.paper)
            return 0
        files = gather(options.paper)
        pages = build(files)
        write_whole(options.out, pack(files))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: {len(files)} files, {pages} pages")
    return 0


def check(paper: pathlib.Path) -> None:
    """Raise ValueError, with a line for every fault, if the last build of ``paper`` has one."""
    log, labels = (paper / f"{MAIN}{suffix}" for suffix in (".log", ".aux"))
    if not log.is_file() or not labels.is_file():
        raise ValueError(f"{paper} has not been built: run make paper first")
    faults = [f"{log}: {line}" for line in warnings(log.read_text(errors="replace"))]
    end = END.search(labels.read_text(errors="replace"))
    if end is None:
        faults.append(f"{labels} lacks the label end:body: put it at the end of the body, before the references")
    elif int(end[1]) > PAGES:
        faults.append(f"the body ends on page {end[1]}, of {PAGES} at most: move floats or details to the appendix")
    if faults:
        raise ValueError("\n".join(faults))


def warnings(log: str) -> list[str]:
    """Return the lines of a TeX log on overfull boxes and on undefined or unstable references."""
    return [line for line in WRAPPED.sub(r"\1", log).splitlines() if WARNED.search(line)]


def gather(paper: pathlib.Path) -> dict[str, bytes]:
    """Load the files that the last build of ``paper`` read from its folder, by name.

    Raises ValueError if there is no build, or if one of these files is gone.
    """
    read = paper / f"{MAIN}.fls"
    if not read.is_file():
        raise ValueError(f"{paper} has not been built: run make paper first")
    lines = [line.split(" ", 1) for line in read.read_text().splitlines()]
    names = {pathlib.PurePath(name).as_posix() for kind, name in lines if kind == "INPUT" and name[0] not in "/~"}
    wanted = sorted(name for name in names if pathlib.PurePath(name).suffix in SOURCES)
    if missing := [name for name in wanted if not (paper / name).is_file()]:
        raise ValueError(f"{paper} lacks {', '.join(missing)}: run make paper again")
    if f"{MAIN}.bbl" not in wanted:
        raise ValueError(f"the paper was built without its bibliography {MAIN}.bbl: run make paper again")
    return {name: (paper / name).read_bytes() for name in wanted}


def build(files: Mapping[str, bytes]) -> int:
    """Build these files in an empty folder and return the number of pages.

    Raises ValueError if they make no page, or if the log has a warning.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"{MAIN}.tex"]
        for _ in range(PASSES):
            try:
                ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
            except FileNotFoundError as error:
                raise ValueError("pdflatex is not installed: make paper names the packages") from error
            if ended.returncode:
                reason = next((line for line in ended.stdout.splitlines() if line.startswith("!")), "no reason given")
                raise ValueError(f"the package does not build by itself: {reason}")
        log = (folder / f"{MAIN}.log").read_text(errors="replace")
    if faults := warnings(log):
        raise ValueError(f"the package builds, but: {faults[0]}")
    written = re.search(r"Output written on .*?\((\d+) pages?", log.replace("\n", ""))
    if written is None:
        raise ValueError("the package makes no page")
    return int(written[1])


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return the files as a compressed tape archive, without times or owners."""
    tape = io.BytesIO()
    with tarfile.open(fileobj=tape, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(tape.getvalue(), mtime=0)


if __name__ == "__main__":
    sys.exit(main())
