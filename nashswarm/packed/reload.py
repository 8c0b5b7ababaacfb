"""Open a saved model in a new process and compare what it computes with the model in memory, bit by bit.

``python -m nashswarm.packed.reload FOLDER FILE`` is that process.
"""

import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor

from nashswarm.models import checks, evaluation

TOKENS = 64  # of one window, which are compared
Outputs = dict[str, Tensor]


def check(folder: pathlib.Path, model: Any, window: Int[Tensor, " length"]) -> None:
    """Open ``folder`` in a new process and compare its logits on the first tokens of ``window`` with the model's.

    A model without logits is compared by its last hidden states.  Raises ValueError in one sentence if the folder
    cannot be opened there, or if a bit differs.
    """
    tokens = evaluation.without_padding(model, window)[:TOKENS].cpu()
    expected = outputs(model, tokens)
    with tempfile.TemporaryDirectory() as place:
        asked, answer = pathlib.Path(place) / "tokens.safetensors", pathlib.Path(place) / "answer.safetensors"
        dtype = str(model.dtype).removeprefix("torch.")
        metadata = {"threads": str(torch.get_num_threads()), "dtype": dtype, "device": str(model.device)}
        safetensors.torch.save_file({"tokens": tokens}, asked, metadata)
        words = [sys.executable, "-m", __name__, str(folder), str(asked), str(answer)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
            raise ValueError(f"the saved model cannot be opened in a new process, so nothing was kept: {last}")
        found = safetensors.torch.load_file(answer)["outputs"]
    if found.shape != expected.shape:
        raise ValueError(f"the saved model computes {tuple(found.shape)} in a new process, not {tuple(expected.shape)}")
    if different := int((found.view(torch.uint8) != expected.view(torch.uint8)).sum()):
        raise ValueError(
            f"the saved model computes other numbers in a new process ({different} of {expected.nbytes} bytes differ), "
            "so nothing was kept: please report this; --no-verify saves it all the same"
        )


@torch.no_grad()
def outputs(model: Any, tokens: Int[Tensor, " length"]) -> Tensor:
    """Return what a model computes of one text first of all: logits, or the last hidden states."""
    first: Tensor = model(input_ids=tokens[None].to(model.device))[0]
    return first.cpu().contiguous()


def main(folder: str, asked: str, answer: str) -> None:
    """Write the outputs of the model in ``folder`` for the tokens in the file ``asked`` to the file ``answer``."""
    with safetensors.safe_open(asked, "pt") as file:
        metadata, tokens = file.metadata(), file.get_tensor("tokens")
    torch.set_num_threads(int(metadata["threads"]))
    kind = checks.compressed_class(pathlib.Path(folder))
    model = kind.from_pretrained(folder, dtype=getattr(torch, metadata["dtype"])).to(metadata["device"])
    safetensors.torch.save_file({"outputs": outputs(model, tokens)}, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
