"""What ``import nashswarm`` takes: packages that most commands do without are imported when they are needed."""

import subprocess
import sys

HEAVY = ("datasets", "matplotlib", "pandas", "pyarrow", "sklearn", "wandb")


def test_importing_the_command_line_imports_no_package_that_compressing_does_without() -> None:
    program = f"import sys, nashswarm, nashswarm.cli; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
