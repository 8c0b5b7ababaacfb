"""Compress, inspect, time, certify and generate text, with the commands of the README.

    python examples/whole_system.py [FOLDER]

FOLDER, new or empty, keeps the compressed model; without it a temporary one is used.
"""

import sys
import tempfile
from typing import Any

import transformers

import nashswarm  # noqa: F401  what makes the format known to transformers
from nashswarm import cli


def main(folder: str, cache: str) -> None:
    few = ["--windows", "8", "--length", "128", "--cache", cache]
    for command in (
        ["compress", "default", "--bits", "3", "--out", folder, *few],
        ["inspect", folder],
        ["bench", folder, "--threads", "1", "--repeats", "3", "--new-tokens", "8"],
        ["certify", folder],
    ):
        print("$ nashswarm", *command, flush=True)
        if status := cli.main(command):
            sys.exit(status)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer("The function returns", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(sys.argv[1] if len(sys.argv) > 1 else f"{temporary}/compressed", f"{temporary}/cache")
