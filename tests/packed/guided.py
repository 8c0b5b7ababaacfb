"""Look by coverage (atheris) for contents of a kind that are neither read nor refused in a sentence.

    python -m tests.packed.guided kind folder runs

The process ends with an error, and leaves the content in the folder, at the first exception that is not a ValueError,
and at the first content that takes longer or allocates more than ``test_mutated_bytes`` allows.
"""

import pathlib
import sys
import warnings

import atheris

with atheris.instrument_imports(include=["nashswarm", "gguf"], enable_loader_override=False):
    from tests.packed import test_mutated_bytes as mutated


def main() -> None:
    kind, folder, runs = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
    warnings.simplefilter("ignore")
    content, read = mutated.contents_in(folder)[kind]
    read(content)
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(content)

    def read_or_refuse(data: bytes) -> None:
        try:
            read(mutated.sealed(data[:4], data[8:]) if kind in mutated.SEALED else data)
        except ValueError as error:
            assert str(error) and "\n\n" not in str(error)

    limits = [f"-timeout={mutated.MOST_SECONDS:.0f}", f"-malloc_limit_mb={mutated.MOST_BYTES >> 20}", "-rss_limit_mb=0"]
    options = [f"-runs={runs}", "-seed=1", *limits, f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read_or_refuse)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
