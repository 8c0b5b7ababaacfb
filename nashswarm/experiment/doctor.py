"""Whether this installation works: versions, kernels, threads, extras, caches, and a self-test of ten seconds."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import transformers
from packaging.requirements import Requirement

import nashswarm
from nashswarm import api, kernels
from nashswarm.kernels import __main__ as examples
from nashswarm.kernels import native
from nashswarm.kernels import tiles as layout
from nashswarm.kernels import trellis as form
from nashswarm.models import sources
from nashswarm.records import provenance

PACKAGE = "nashswarm"
SHOWN = ("torch", "transformers", "numpy", "hydra-core", "safetensors")
LIMIT = 1e-5  # relative error of a product with float32 activations
GOOD, NOTE, BAD = "ok", "note", "FAIL"


class Finding(NamedTuple):
    """One line of the report.  ``state``: ``ok``, ``note`` (it works, but something could be better) or ``FAIL``."""

    name: str
    state: str
    text: str


def examine(cache: pathlib.Path) -> Iterator[Finding]:
    """Yield what each check finds, the slow self-tests last.  ``cache``: the folder that commands compute into."""
    yield from versions()
    yield kernel()
    yield threads()
    yield devices()
    yield from extras()
    yield from caches(cache)
    yield tried("products", products)
    yield tried("round trip", round_trip)


def versions() -> Iterator[Finding]:
    """Yield the version of Python and packages, and each requirement that is not met."""
    commit = provenance.code()[0]
    own = f"{nashswarm.__version__}{f' at {commit[:7]}' if commit else ''}"
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    yield Finding("versions", GOOD, f"nashswarm {own}, Python {platform.python_version()}, {shown}")
    for wanted in required(""):
        if (trouble := unmet(wanted)) is not None:
            yield Finding("versions", BAD, f"{trouble}: pip install '{wanted.name}{wanted.specifier}'")


def required(extra: str) -> list[Requirement]:
    """Return what this package, or one of its extras, requires on this machine; nothing if it is not installed."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = map(Requirement, lines)
    if not extra:
        return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    markers = ((one, one.marker) for one in found if one.marker is not None)
    return [one for one, marker in markers if marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})]


def unmet(wanted: Requirement) -> str | None:
    """Return how a requirement is not met, or None if it is."""
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{wanted.name} is not installed"
    fits = wanted.specifier.contains(version, prereleases=True)
    return None if fits else f"{wanted.name} {version} does not fit {wanted.specifier}"


def kernel() -> Finding:
    """Find which kernels multiply packed weights."""
    loaded, chosen = native.library(), native.path()
    if isinstance(loaded, str):
        return Finding("kernels", NOTE, f"torch, slow: {loaded}")
    others = [name for name in native.available() if name != chosen]
    forced = f", set by {native.VARIABLE}" if os.environ.get(native.VARIABLE) else ""
    return Finding("kernels", GOOD, f"{chosen}{forced}; also {', '.join(others)}")


def threads() -> Finding:
    """Find how many threads torch computes on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count, variable = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    text = f"{count} of {cores} cores{f', set by OMP_NUM_THREADS={variable}' if variable else ''}"
    return Finding("threads", NOTE if count > cores else GOOD, text)


def devices() -> Finding:
    """Find what models can run on."""
    names = ["cpu", *(f"cuda ({torch.cuda.get_device_name(n)})" for n in range(torch.cuda.device_count()))]
    return Finding("devices", GOOD, ", ".join([*names, *(["mps"] if torch.backends.mps.is_available() else [])]))


def extras() -> Iterator[Finding]:
    """Yield what each extra of this package lacks."""
    try:
        names = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("extras", NOTE, f"{PACKAGE} is imported, not installed: pip install -e . in the checkout")
        return
    lacking = {name: [one.name for one in required(name) if unmet(one) is not None] for name in names}
    yield Finding("extras", GOOD, f"complete: {', '.join(name for name in names if not lacking[name]) or 'none'}")
    for name, missing in lacking.items():
        if missing:
            yield Finding("extras", GOOD, f"{name} lacks {', '.join(missing)}: pip install '{PACKAGE}[{name}]'")


def caches(cache: pathlib.Path) -> Iterator[Finding]:
    """Yield the size of each folder that is computed or downloaded into; it must be writable."""
    hub = pathlib.Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    for name, folder in (("nashswarm", cache.expanduser()), ("hub", hub.expanduser())):
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        parent = next(path for path in (folder, *folder.parents) if path.exists())
        text = f"{name}: {folder}, {held * 1e-6:,.0f} MB, {shutil.disk_usage(parent).free * 1e-9:,.0f} GB free"
        writable = os.access(parent, os.W_OK)
        yield Finding("caches", GOOD if writable else BAD, text if writable else f"{text}, cannot be written")


def tried(name: str, test: Callable[[], str]) -> Finding:
    """Run a self-test: what it returns is good, what it raises is not."""
    try:
        return Finding(name, GOOD, test())
    except Exception as error:
        return Finding(name, BAD, f"{type(error).__name__}: {error}")


def products() -> str:
    """Multiply by packed matrices of both forms and compare with float64.  Raises ValueError if they disagree."""
    worst = 0.0
    for matrix in (examples.example(192, 256, (2, 3, 4, 8), 64, False), examples.example_trellis(192, 256, (2, 3, 4))):
        weight = (form if isinstance(matrix, form.Trellis) else layout).dequantize(matrix).double()
        inputs = torch.randn(5, matrix.columns, generator=torch.Generator().manual_seed(0))
        exact = inputs.double() @ weight.T
        error = float((kernels.matmul(inputs, matrix, "float32").double() - exact).norm() / exact.norm())
        worst = max(worst, error)
        if not error <= LIMIT:
            kind = type(matrix).__name__.lower()
            raise ValueError(f"a product with {kind} is off by {error:.1e}; set {native.VARIABLE}=torch to go on")
    return f"packed matrices agree with float64 to {worst:.0e}"


def round_trip() -> str:
    """Compress a tiny model, save it and load it again.  Raises ValueError if anything is lost on the way."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED)
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    windows = torch.randint(len(tokenizer), (4, 32), generator=torch.Generator().manual_seed(0))
    small, told = api.compress(model, tokenizer, calibration=windows, bits=3.0, effort="quick")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        small.save_pretrained(folder)
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        if not torch.equal(small(windows).logits, again(windows).logits):
            raise ValueError("a model that was saved and loaded again answers otherwise; please report this")
    return f"a tiny model was compressed to {told.bits_per_weight_model:.2f} bits, saved and loaded: the same"


def doctor(cache: pathlib.Path) -> int:
    """Print what every check finds as it comes, and return 1 if one failed."""
    failed = 0
    for finding in examine(cache):
        failed += finding.state == BAD
        mark = "" if finding.state == GOOD else f"{finding.state}: "
        print(f"{finding.name:<11} {mark}{finding.text}", flush=True)
    if failed:
        print(f"{failed} check{'s' * (failed > 1)} failed", file=sys.stderr)
    else:
        print("nashswarm works here")
    return 1 if failed else 0
