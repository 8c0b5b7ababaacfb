"""Refuse what cannot be compressed, in one sentence, before any slow work: folders, models and windows of tokens."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import safetensors
import torch
import transformers
from jaxtyping import Int
from torch import Tensor

OURS = "nashswarm"
SCALED = {"fp8": "_scale_inv", "mxfp4": "_scales"}  # what transformers turns back into floats → how its scales end
ADAPTER, CONFIG = "adapter_config.json", "config.json"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the warnings and progress bars of transformers away during the context, and give them back after it."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Compute with gradients, in float32 and on the CPU by default, whatever the caller's own settings of torch are."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def check_folder(folder: pathlib.Path) -> None:
    """Raise ValueError for a folder that holds an adapter, or a model that is quantized already."""
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"the folder {folder} holds an adapter ({ADAPTER}): merge it into its model by peft's merge_and_unload(), "
            "and save that"
        )
    if not (folder / CONFIG).is_file():
        return
    try:
        quantized = json.loads((folder / CONFIG).read_text()).get("quantization_config")
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not quantized:
        return
    method = quantized.get("quant_method", "an unnamed method") if isinstance(quantized, dict) else quantized
    if method == OURS:
        raise ValueError(
            f"the model in {folder} was compressed by nashswarm already: start from the full model, or use "
            "nashswarm rebudget"
        )
    if method not in SCALED or not _has_tensors(folder, SCALED[method]):
        raise ValueError(
            f"the model in {folder} is quantized already, by {method}: start from the full model, in 16 or 32 bits"
        )


def _has_tensors(folder: pathlib.Path, suffix: str) -> bool:
    """Check whether a folder's safetensors files hold a tensor whose name ends so."""
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(safetensors.SafetensorError), safetensors.safe_open(path, "pt") as file:
            if any(name.endswith(suffix) for name in file.keys()):  # noqa: SIM118  it is no dict
                return True
    return False


def compressed_class(folder: pathlib.Path) -> Any:
    """Return the class of the compressed model in ``folder``.

    Raises ValueError if there is none, and for a model with code of its own, which is not run.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} holds no {CONFIG}: name a folder that nashswarm compress made")
    config = json.loads((folder / CONFIG).read_text())
    if "quantization_config" not in config:
        raise ValueError(f"the model in {folder} is not compressed: use nashswarm compress first")
    if "auto_map" in config:
        raise ValueError(
            f"the model in {folder} needs code of its own, which this command does not run: load it in Python by "
            "from_pretrained with trust_remote_code=True"
        )
    known = getattr(transformers, config["architectures"][0], None)
    return known or transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(transformers.AutoConfig.from_pretrained(folder))]


def check_model(model: Any) -> None:
    """Raise ValueError for a model with adapters, without values in memory, or with values that are not finite.

    Such a model would be compressed to another one in silence, or fail after minutes.
    """
    if not getattr(model.config, "return_dict", True):
        raise ValueError(
            "the model's config says return_dict=False, with which transformers cannot run it: set "
            "model.config.return_dict = True, or take the line out of config.json"
        )
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # no module can be an adapter before its class is imported
    for name, module in model.named_modules():
        if tuners is not None and isinstance(module, tuners.BaseTunerLayer):
            raise ValueError(
                f"the model carries an adapter at {name}: merge it by merge_and_unload() of its PeftModel, or take it "
                "off by unload() (model.delete_adapter() for one that add_adapter put on)"
            )
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} has no values in memory (meta device, or offloaded): load the model without device_map"
            )
        wrong = parameter.numel() - int(parameter.detach().isfinite().sum())
        if wrong:
            raise ValueError(
                f"{wrong} of {parameter.numel()} numbers of {name} are NaN or infinite: the checkpoint is broken, get "
                "it again"
            )


def check_tokens(windows: Int[Tensor, "windows length"], model: Any, tokenizer: Any) -> None:
    """Raise ValueError for windows with a token beyond the model's embedding, which names the token."""
    rows = len(model.get_input_embeddings().weight)
    wrong = windows[(windows < 0) | (windows >= rows)]
    if len(wrong):
        text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(int(wrong[0]))!r})"
        raise ValueError(
            f"calibration holds the token {int(wrong[0])}{text}, the model's embedding has {rows} rows: give the "
            "tokenizer of this model"
        )
