"""The quick start: the ablation on the embedded model, from nothing to a table, a figure and a page.

Two processes share the runs and the cache of calibration.  What each run does is what ``experiments.run`` does with the
same config, so its record is the same; ``measure=quality`` leaves out times.
"""

import concurrent.futures
import logging
import multiprocessing
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import matplotlib.style
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nashswarm.experiment import choices, run
from nashswarm.records import files, record
from nashswarm.records.record import Record
from nashswarm.reporting import frame, labels, typeset
from nashswarm.reporting.figures import quality, style
from nashswarm.reporting.formats import FORMATS
from nashswarm.reporting.page import page

EXPERIMENT = "ablation"
OVERRIDES = (f"experiment={EXPERIMENT}", "measure=quality", "dataset.test_windows=32", "wandb=disabled")
COMMAND = ["nashswarm quickstart"]
JOBS = 2  # processes
WRITERS = {".md": typeset.markdown, ".csv": typeset.csv, ".tex": typeset.latex}


def quickstart(out: pathlib.Path, jobs: int = JOBS) -> int:
    """Run the ablation in ``jobs`` processes, write table, figure and page into ``out``, and return the exit status.

    Runs with a record are skipped.  The status is 1 if a run failed; the others are shown all the same.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: give at least one process")
    methods = choices.methods_of(EXPERIMENT)
    console, started = typeset.console(), time.monotonic()
    console.print(f"{len(methods)} methods compress the embedded model, {jobs} at a time.")
    console.print("Two minutes on two idle cores; the first run ends after about half a minute.")
    done: dict[str, Record] = {}
    for method, ended in tracked(methods, out, jobs, console):
        if isinstance(ended, Record):
            done[method] = ended
        else:
            console.print(f"{method} failed: {ended}", markup=False, highlight=False)
    if not done:
        print("no run ended well, so there is nothing to show", file=sys.stderr)
        return 1
    paths = report([done[method] for method in methods if method in done], out, console)
    console.print(f"{len(done)} of {len(methods)} runs in {time.monotonic() - started:.0f} s")
    for what, path in paths.items():
        console.print(f"  {what:<12} {path}", markup=False, highlight=False, soft_wrap=True)
    console.print("Next, a model of your own: nashswarm compress MODEL --bits 3 --out FOLDER", highlight=False)
    return 0 if len(done) == len(methods) else 1


def report(records: Sequence[Record], out: pathlib.Path, console: Console) -> dict[str, pathlib.Path]:
    """Print the table of the runs, write table, figure and page, and return where each one is."""
    means = frame.tested(frame.average(frame.frame(records)), records)
    console.print(typeset.terminal(means, EXPERIMENT, width=console.width))
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells of every glyph in a figure
    for suffix, write in WRITERS.items():
        files.write_whole(out / "tables" / f"{EXPERIMENT}{suffix}", write(means, typeset.COLUMNS).encode())
    with matplotlib.style.context(style.STYLE):
        _, figure = style.save(quality.pareto(means), out / "figures" / f"{EXPERIMENT}_pareto")
        files.write_whole(out / f"{EXPERIMENT}.html", page(records, COMMAND).encode())
    table = out / "tables" / f"{EXPERIMENT}.md"
    return {"whole table": table, "figure": figure, "page": out / f"{EXPERIMENT}.html", "records": out / "records"}


def tracked(
    methods: Sequence[str], out: pathlib.Path, jobs: int, console: Console
) -> Iterator[tuple[str, Record | str]]:
    """Run every method, show each end and, in a terminal, a bar; yield methods with their record or what failed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=len(methods))
        for count, (method, ended) in enumerate(run_all(methods, out, jobs), 1):
            progress.update(bar, completed=count, description=f"{method} done")
            if isinstance(ended, Record):
                size, kl, seconds = (FORMATS[name](ended.metrics[name]) for name in ("bytes_file", "kl", "seconds"))
                line = f"{count:>3}/{len(methods)} {method:<16} {size} MB, KL {kl}, {seconds} s"
                progress.console.print(line, highlight=False)
            yield method, ended


def run_all(methods: Sequence[str], out: pathlib.Path, jobs: int) -> Iterator[tuple[str, Record | str]]:
    """Yield each method when its run ends, with its record or one sentence on what failed.

    Runs that were lost because a process was killed are tried again, one at a time.  The main method comes first:
    others read its statistics from the cache.  The method without a cache comes second, because it takes longest.
    """
    first = [name for name in (labels.TESTED_AGAINST[0], "no_cache") if name in methods]
    order = [*first, *(name for name in methods if name not in first)]
    lost = []
    with _pool(min(jobs, len(order))) as pool:
        running = {pool.submit(run_one, method, out): method for method in order}
        for future in concurrent.futures.as_completed(running):
            if isinstance(future.exception(), BrokenProcessPool):  # one worker died, and with it the whole pool
                lost.append(running[future])
            else:
                yield running[future], _ended(future)
    for method in lost:
        with _pool(1) as alone:
            yield method, _ended(alone.submit(run_one, method, out))


def _pool(count: int) -> concurrent.futures.ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # torch does not survive a fork
    return concurrent.futures.ProcessPoolExecutor(count, spawn, _begin)


def _ended(future: "concurrent.futures.Future[pathlib.Path]") -> Record | str:
    """Return the record of a run, or one sentence on what failed, which shall not cost the other runs."""
    try:
        return record.read(future.result())
    except BrokenProcessPool:
        return "its process was killed, perhaps for want of memory"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def run_one(method: str, out: pathlib.Path) -> pathlib.Path:
    """Run one method of the ablation, or find its record, and return the path of the record."""
    config = choices.compose(*OVERRIDES, f"method={method}")
    config.records, config.cache = str(out / "records"), str(out / "cache")
    names = {"model": "default", "method": method, "dataset": "stdlib_docs", "measure": "quality"}
    return run.run(config, {"experiment": EXPERIMENT} | names).path


def _begin() -> None:
    """Compute on one thread, end silently at Ctrl-C, and leave progress to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("nashswarm").setLevel(logging.WARNING)
    torch.set_num_threads(1)
