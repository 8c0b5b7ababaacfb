"""Fine-tune classifiers with transformers' Trainer, and cache them under a fingerprint of everything they depend on."""

import dataclasses
import json
import logging
import pathlib
import shutil

import numpy as np
import torch
import transformers

from nashswarm.data import corpus
from nashswarm.data.glue import TASKS, Glue, example_windows, read_labels
from nashswarm.models import sources
from nashswarm.records.files import claim, write_folder
from nashswarm.records.record import fingerprint

SAVE_STEPS = 100  # steps between checkpoints, from which interrupted training continues
CHECKPOINTS = "checkpoints"
log = logging.getLogger(__name__)


def fine_tuned(
    dataset: Glue, source: sources.Source, text: str, device: str, dtype: torch.dtype, cache: pathlib.Path
) -> sources.LoadedModel:
    """Load the model of ``source`` fine-tuned on the training examples in ``text``, or fine-tune it first.

    The folder ``cache`` holds one model per combination of weights, text, settings and versions.  Interrupted training
    continues at its last checkpoint.  Raises ValueError for a model that cannot be loaded.
    """
    identity = {
        "model": sources.content_digest(source),
        "task": dataset.task,
        "training_sha256": corpus.sha256(text),
        "training": dataclasses.asdict(dataset.training),
        "sequence_length": dataset.sequence_length,
        "device": device,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    folder = cache / f"{dataset.task}-{fingerprint(identity)}"
    classes = TASKS[dataset.task].classes
    with claim(folder):  # workers of one sweep need the same model
        if not folder.is_dir():
            loaded = sources.load(source, device, dtype, classes)
            checkpoints = folder.with_name(f"{folder.name}-{CHECKPOINTS}")
            _train(loaded, dataset, text, checkpoints, device)

            def fill(partial: pathlib.Path) -> None:
                loaded.model.save_pretrained(partial)
                loaded.tokenizer.save_pretrained(partial)

            write_folder(folder, {"training.json": (json.dumps(identity, indent=1) + "\n").encode()}, fill)
            shutil.rmtree(checkpoints, ignore_errors=True)
    return sources.load(sources.ModelSource(str(folder)), device, dtype, classes)


def _train(loaded: sources.LoadedModel, dataset: Glue, text: str, checkpoints: pathlib.Path, device: str) -> None:
    """Fine-tune in place.  Batches hold examples of similar length, which keeps padding short."""
    settings = dataset.training
    length = loaded.window_length(dataset.sequence_length)
    tokens, labels = example_windows(text, loaded.tokenizer, length, "training"), read_labels(text)
    order = np.random.default_rng(settings.seed).permutation(len(tokens))[: settings.examples]
    pad = loaded.tokenizer.pad_token_id
    label_type = float if TASKS[dataset.task].classes == 1 else int
    examples = [
        {"input_ids": tokens[row][tokens[row] != pad].tolist(), "label": label_type(labels[row])} for row in order
    ]
    steps = int(-(-len(examples) // settings.batch_size) * settings.epochs)
    log.info("fine-tuning on %d examples of %s, %d steps", len(examples), dataset.task, steps)
    arguments = transformers.TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=steps // 20,
        train_sampling_strategy="group_by_length",
        seed=settings.seed,
        bf16=settings.precision == "bfloat16",
        optim="adamw_torch_fused",
        use_cpu=device == "cpu",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        logging_steps=SAVE_STEPS,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=loaded.model,
        args=arguments,
        train_dataset=examples,
        data_collator=transformers.DataCollatorWithPadding(loaded.tokenizer),
    )
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    loaded.model.eval()
