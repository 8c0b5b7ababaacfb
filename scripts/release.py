"""Check that every file with a version or a repository has the version of a tag and the repository it was pushed to.

python scripts/release.py v0.1.0-alpha --repository account/nashswarm
"""

import argparse
import json
import pathlib
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence

import yaml
from packaging.version import InvalidVersion, Version

ROOT = pathlib.Path(__file__).parent.parent
GITHUB = "https://github.com/"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", help="v and a version, in any spelling of it")
    parser.add_argument("--repository", required=True, metavar="ACCOUNT/NAME", help="where the tag was pushed")
    options = parser.parse_args(arguments)
    differences = differing(options.tag, options.repository)
    print("\n".join(differences), end="\n" if differences else "", file=sys.stderr)
    return int(bool(differences))


def differing(tag: str, repository: str) -> list[str]:
    """Return a sentence for every file that names another version or another repository."""
    differences = []
    try:
        version = Version(tag)
    except InvalidVersion:
        return [f"the tag {tag} is no version: call it v{versions()['pyproject.toml']}"]
    for place, written in versions().items():
        if not tag.startswith("v") or Version(written) != version:
            differences.append(f"{place} says {written}, the tag {tag}: change one of them")
    for place, written in repositories().items():
        if written != repository:
            differences.append(f"{place} names the repository {written}, this is {repository}: replace it there")
    return differences


def versions() -> Mapping[str, str]:
    """Load the version of this project from each file that has one."""
    package = re.search(r'^__version__ = "(.+)"$', (ROOT / "nashswarm/__init__.py").read_text(), re.M)
    assert package is not None
    return {
        "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "nashswarm/__init__.py": package[1],
        "CITATION.cff": str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]),
        ".zenodo.json": json.loads((ROOT / ".zenodo.json").read_text())["version"],
    }


def repositories() -> Mapping[str, str]:
    """Load the repository of this project, as account and name, from each file that has one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    repository_of = {"pyproject.toml": project["urls"]["Repository"].removeprefix(GITHUB)}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        install = re.search(rf"git\+{GITHUB}([\w-]+/[\w-]+)", path.read_text())
        repository_of[f"notebooks/{path.name}"] = "none" if install is None else install[1]
    return repository_of


if __name__ == "__main__":
    sys.exit(main())
