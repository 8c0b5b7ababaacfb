"""From the last states of a model to its logits: the output head, and what an architecture does after it."""

import contextlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast


class OutputHead(nn.Module):
    """The part of a model that computes logits from its last states, at single positions.

    It is the output head, or where the architecture goes on from there, for example by a scale or a soft cap, the
    model itself without its body.  Where neither gives the model's logits, ``states`` are the logits themselves.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = [model]  # in a list, so that it is no part of this module
        self.head: nn.Module | None = model.get_output_embeddings()
        self.bare: bool | None = None  # until a run has told

    @torch.no_grad()
    def run(self, tokens: Int[Tensor, "windows length"]) -> tuple[Tensor, Float[Tensor, "windows length vocabulary"]]:
        """Return the states of the model after these tokens, and its logits."""
        seen: list[Tensor] = []
        handles = []
        if self.head is not None:
            handles.append(self.head.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach())))
        try:
            logits: Tensor = self.model[0](input_ids=tokens, return_dict=True).logits
        finally:
            for handle in handles:
                handle.remove()
        if self.bare is None:
            self._choose(seen[-1] if seen else None, logits)
        return (logits if self.head is None else seen[-1]), logits

    def _choose(self, states: Tensor | None, logits: Tensor) -> None:
        """Choose the first way from these states to these logits that is exact."""
        for self.bare in (True, False):
            with contextlib.suppress(Exception):  # of an architecture whose parts do not fit together so
                if states is not None and torch.equal(self(states), logits):
                    return
        self.head = None

    def forward(self, states: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocabulary"]:
        """Return the logits of states."""
        if self.bare is None:
            self.run(torch.arange(1, 9, device=states.device)[None])  # none of them padding, whose states may be zero
        if self.head is None:
            return states
        if self.bare:
            logits: Tensor = self.head(states)
            return logits
        model, rows = self.model[0], states.flatten(0, -3) if states.ndim > 2 else states.unsqueeze(0)
        body = model.base_model
        body.forward = lambda *given, **options: BaseModelOutputWithPast(last_hidden_state=rows)
        try:
            logits = model(input_ids=torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)).logits
        finally:
            del body.forward
        return logits.view(*states.shape[:-1], -1)
