"""Read source code from CPython's standard library, the files of the running interpreter as they are.

Code has other tokens than prose about it.  Nothing is downloaded; what a run read is named by its sha256.
"""

import functools
import pathlib
import sysconfig

from nashswarm.data.stdlib_docs import NOT_PROSE, SPLITS, split_of

NOT_CODE = {"pydoc_data", "encodings", "lib2to3"}  # tables, and the text that ``stdlib_docs`` reads


@functools.cache
def text(split: str) -> str:
    """Return the modules of ``split`` (train, calibration or test) as one text, sorted by name.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the standard library: choose one of {', '.join(SPLITS)}")
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    modules = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        left_out = (NOT_PROSE | NOT_CODE) & set(parts) or parts[0].startswith("config-")
        if not left_out and split_of("source " + ".".join(parts)) == split:
            modules.append(path.read_bytes().decode(errors="ignore"))
    return "\n\n".join(modules)
