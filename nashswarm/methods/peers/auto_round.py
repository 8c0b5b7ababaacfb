"""A library that calibrates for itself: Intel's AutoRound, on our calibration windows and in its own packed form.

It tunes the rounding and the ranges of a block's matrices by signed gradient descent on the block's output (Cheng et
al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023), block after block.
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
from collections.abc import Iterator, Sequence
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from nashswarm.layers import Layer

ITERATIONS = 200  # of a block, as its makers have it
BATCH = 8  # windows, likewise
ROWS = 32  # its packed words hold the zero points of so many rows
TABLES = "lookups"
PARTS = ("qweight", "qzeros", "scales")  # what its file holds of a matrix

Found = dict[str, tuple[list[Tensor], Tensor]]  # layer → its packed tensors, and the weights that they stand for


def auto_round(
    model: Any,
    windows: Integer[Tensor, "windows length"],
    layers: Sequence[Layer],
    bits: int,
    group_size: int,
    seed: int,
) -> Found:
    """Every layer packed by AutoRound with symmetric grids, its own default: tensors read from the file that it writes,
    and the weights by which its modules multiply.

    A matrix outside of the blocks that multiplies is tuned too, one that is looked up is rounded by its range search.
    All other matrices stay as they are.
    """
    from auto_round import AutoRound, SignRoundConfig

    logging.getLogger("autoround").setLevel(logging.ERROR)
    scheme = {"bits": bits, "group_size": group_size, "sym": True, "data_type": "int", "act_bits": 16}
    with _apart(), tempfile.TemporaryDirectory() as folder:
        bench, places = _bench(model, layers)
        linear = {name: module for name, module in bench.named_modules() if isinstance(module, nn.Linear)}
        config = {
            name: scheme | {"bits": 16, "data_type": "fp"}
            for name, module in linear.items()
            if module is not bench.get_output_embeddings()
        }
        config |= {name: dict(scheme) for name in places.values()}
        tuner = AutoRound(
            bench, types.SimpleNamespace(), scheme=scheme, layer_config=config, dataset=list(windows.cpu()[:, None]),
            alg_configs=SignRoundConfig(iters=ITERATIONS), seqlen=windows.shape[1], nsamples=len(windows),
            batch_size=min(BATCH, len(windows)), seed=seed, device_map="cpu", amp=False, low_cpu_mem_usage=False,
            enable_torch_compile=False,
        )  # fmt: skip
        tuner.quantize()
        tuner.save_quantized(folder, format="auto_round", inplace=True)
        stored: dict[str, Tensor] = {}
        for path in pathlib.Path(folder).rglob("*.safetensors"):
            stored |= safetensors.torch.load_file(path)
    found = {layer.name: bench.get_submodule(places[layer.name]) for layer in layers}
    left = [name for name, module in found.items() if not hasattr(module, "qweight")]
    assert not left, f"not replaced: {', '.join(left)}"
    return {layer.name: _taken(found[layer.name], stored, places[layer.name], layer) for layer in layers}


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """The library seeds global generators, writes its progress to wherever the errors go, and collects garbage at every
    turn: of what is there already it need not look at anything again."""
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


def _bench(model: Any, layers: Sequence[Layer]) -> tuple[Any, dict[str, str]]:
    """A copy of the model on the CPU, every Conv1D a Linear, with a Linear beside it for each layer that is looked up;
    and where each layer stands in it."""
    bench = copy.deepcopy(model).float().cpu()
    for name, module in list(bench.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and type(module) is not nn.Linear:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            bench.set_submodule(name, _linear(weight.detach().contiguous(), module.bias))
    places = {layer.name: layer.name for layer in layers}
    tables = nn.Module()
    for number, layer in enumerate(layers):
        if "Embedding" in layer.kinds:
            missing = -len(layer.weight) % ROWS
            tables.add_module(str(number), _linear(functional.pad(layer.weight, (0, 0, 0, missing)), None))
            places[layer.name] = f"{TABLES}.{number}"
    bench.add_module(TABLES, tables)
    bench.config.tie_word_embeddings = False  # it takes the last module for the head, and leaves a tied one out
    return bench, places


def _linear(weight: Float[Tensor, "out in"], bias: Tensor | None) -> nn.Linear:
    rows, columns = weight.shape
    found = nn.Linear(columns, rows, bias is not None)
    found.weight = nn.Parameter(weight.clone())
    if bias is not None:
        found.bias = nn.Parameter(bias.detach())
    return found


def _taken(module: Any, stored: dict[str, Tensor], place: str, layer: Layer) -> tuple[list[Tensor], Tensor]:
    """The packed tensors of a layer in the file, and the weights by which the library's module multiplies."""
    parts = [stored[f"{place}.{part}"] for part in PARTS]
    assert all(torch.equal(part, getattr(module, name)) for part, name in zip(parts, PARTS, strict=True))
    module.bias = None
    rows = module(torch.eye(layer.weight.shape[1]))
    return parts, rows.T[: len(layer.weight)].float().contiguous()
