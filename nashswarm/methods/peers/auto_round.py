"""Intel's AutoRound, tuned on the calibration windows of the experiment and stored in its own packed form.

AutoRound tunes the rounding and the ranges of a block's matrices by signed gradient descent on the block's output
(Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023), one block
after another.
"""

import contextlib
import copy
import gc
import io
import logging
import pathlib
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from nashswarm.layers import Layer
from nashswarm.methods.peers.library import GROUP_SIZES, Library, Packed, concatenate_bytes

ITERATIONS = 200  # per block, the default of its authors
BATCH = 8  # windows per iteration, the default too
WORD_ROWS = 32  # rows whose zero points share the packed words
EMBEDDINGS = "lookups"  # module that holds the layers that are looked up
PARTS = ("qweight", "qzeros", "scales")  # tensors of a matrix in AutoRound's file


def tune(
    model: Any,
    windows: Integer[Tensor, "windows length"],
    layers: Sequence[Layer],
    bits: int,
    group_size: int,
    seed: int,
) -> dict[str, Packed]:
    """Pack every layer by AutoRound with symmetric grids, its default.

    The bytes are the tensors in the file that AutoRound writes; the weights are those by which its modules multiply.  A
    matrix outside of the blocks is tuned too if it multiplies, and rounded by AutoRound's range search if it is looked
    up.  All matrices that are not in ``layers`` stay as they are.
    """
    from auto_round import AutoRound, SignRoundConfig

    logging.getLogger("autoround").setLevel(logging.ERROR)
    scheme = {"bits": bits, "group_size": group_size, "sym": True, "data_type": "int", "act_bits": 16}
    with _isolated(), tempfile.TemporaryDirectory() as folder:
        linear_model, module_names = _as_linear_model(model, layers)
        config = {
            name: scheme | {"bits": 16, "data_type": "fp"}
            for name, module in linear_model.named_modules()
            if isinstance(module, nn.Linear) and module is not linear_model.get_output_embeddings()
        }
        config |= {name: dict(scheme) for name in module_names.values()}
        tuner = AutoRound(
            linear_model, types.SimpleNamespace(), scheme=scheme, layer_config=config,
            dataset=list(windows.cpu()[:, None]), alg_configs=SignRoundConfig(iters=ITERATIONS),
            seqlen=windows.shape[1], nsamples=len(windows), batch_size=min(BATCH, len(windows)), seed=seed,
            device_map="cpu", amp=False, low_cpu_mem_usage=False, enable_torch_compile=False,
        )  # fmt: skip
        tuner.quantize()
        tuner.save_quantized(folder, format="auto_round", inplace=True)
        stored: dict[str, Tensor] = {}
        for path in pathlib.Path(folder).rglob("*.safetensors"):
            stored |= safetensors.torch.load_file(path)
    modules = {layer.name: linear_model.get_submodule(module_names[layer.name]) for layer in layers}
    unpacked = [name for name, module in modules.items() if not hasattr(module, "qweight")]
    assert not unpacked, f"not replaced: {', '.join(unpacked)}"
    return {layer.name: _packed(layer, modules[layer.name], stored, module_names[layer.name]) for layer in layers}


LIBRARY = Library(None, dict.fromkeys((2, 3, 4), GROUP_SIZES), ("auto-round",), row_multiple=WORD_ROWS, tune=tune)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Undo AutoRound's side effects: it seeds global generators and prints its progress to stderr.

    AutoRound also collects garbage at every step; freezing what exists spares looking at it each time.
    """
    silence: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if not sys.stderr.isatty():
        silence = contextlib.redirect_stderr(io.StringIO())
    gc.collect()
    gc.freeze()
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), silence:
            yield
    finally:
        gc.unfreeze()


def _as_linear_model(model: Any, layers: Sequence[Layer]) -> tuple[Any, dict[str, str]]:
    """Return a CPU copy of the model in which every layer is a Linear, and layer name → module name in the copy.

    AutoRound packs Linear modules only.  A Conv1D is replaced; a layer that is looked up gets a Linear of its own.
    """
    copied = copy.deepcopy(model).float().cpu()
    for name, module in list(copied.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and type(module) is not nn.Linear:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            copied.set_submodule(name, _linear(weight.detach().contiguous(), module.bias))
    module_names = {layer.name: layer.name for layer in layers}
    embeddings = nn.Module()
    for number, layer in enumerate(layers):
        if "Embedding" in layer.kinds:
            padding = -len(layer.weight) % WORD_ROWS
            embeddings.add_module(str(number), _linear(functional.pad(layer.weight, (0, 0, 0, padding)), None))
            module_names[layer.name] = f"{EMBEDDINGS}.{number}"
    copied.add_module(EMBEDDINGS, embeddings)
    copied.config.tie_word_embeddings = False  # AutoRound takes the last module for the head, and skips a tied head
    return copied, module_names


def _linear(weight: Float[Tensor, "out in"], bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias is not None)
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    return linear


def _packed(layer: Layer, module: Any, stored: Mapping[str, Tensor], module_name: str) -> Packed:
    """Return the layer's bytes in AutoRound's file, and the weights by which its module multiplies."""
    parts = [stored[f"{module_name}.{part}"] for part in PARTS]
    assert all(torch.equal(part, getattr(module, name)) for part, name in zip(parts, PARTS, strict=True))
    module.bias = None
    columns = module(torch.eye(layer.weight.shape[1]))
    return concatenate_bytes(*parts), columns.T[: len(layer.weight)].float().contiguous()
