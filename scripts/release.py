"""Whether this is the release that a tag names: the same version and the same repository wherever one is written.

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
    wrong = differing(options.tag, options.repository)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


def differing(tag: str, repository: str) -> list[str]:
    """A sentence for everything that names another version or another repository."""
    wrong = []
    try:
        version = Version(tag)
    except InvalidVersion:
        return [f"the tag {tag} is no version: call it v{versions()['pyproject.toml']}"]
    for place, found in versions().items():
        if not tag.startswith("v") or Version(found) != version:
            wrong.append(f"{place} says {found}, the tag {tag}: change one of them")
    for place, found in repositories().items():
        if found != repository:
            wrong.append(f"{place} names the repository {found}, this is {repository}: replace it there")
    return wrong


def versions() -> Mapping[str, str]:
    """The version of this project, by the file that says it."""
    package = re.search(r'^__version__ = "(.+)"$', (ROOT / "nashswarm/__init__.py").read_text(), re.M)
    assert package is not None
    return {
        "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "nashswarm/__init__.py": package[1],
        "CITATION.cff": str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]),
        ".zenodo.json": json.loads((ROOT / ".zenodo.json").read_text())["version"],
    }


def repositories() -> Mapping[str, str]:
    """Where this project is said to be kept, account and name, by the file that says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {"pyproject.toml": project["urls"]["Repository"].removeprefix(GITHUB)}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        install = re.search(rf"git\+{GITHUB}([\w-]+/[\w-]+)", path.read_text())
        found[f"notebooks/{path.name}"] = "none" if install is None else install[1]
    return found


if __name__ == "__main__":
    sys.exit(main())
