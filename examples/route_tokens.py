"""Route tokens to experts, and show what prices do to the load.

    python examples/route_tokens.py

Tokens are states of the embedded model, experts are random centroids; only the prices are trained.  They move after
every batch of calibration text, never within it, and the load is measured on text that no price has seen.
"""

import torch
import transformers
from torch import Tensor

from nashswarm.data import corpus, stdlib_docs
from nashswarm.models import sources
from nashswarm.moe import load
from nashswarm.moe.router.loss_free import LossFree
from nashswarm.moe.router.nash_swarm import NashSwarmRouter
from nashswarm.moe.router.top_k import TopK

EXPERTS, TOP_K = 16, 2
LENGTH, BATCH = 128, 8  # tokens of a window, windows
ROUTERS: dict[str, TopK | LossFree | NashSwarmRouter] = {
    "top-k": TopK(),
    "loss-free bias": LossFree(rate=0.01),
    "nash swarm": NashSwarmRouter(),
}


@torch.no_grad()
def states(model: transformers.PreTrainedModel, windows: Tensor) -> Tensor:
    """Return the normalized input of the third block's router, of shape (tokens, width)."""
    hidden = model(input_ids=windows, output_hidden_states=True).hidden_states[2].flatten(0, 1)
    return torch.nn.functional.layer_norm(hidden, hidden.shape[1:])


def main() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(sources.EMBEDDED)
    model = transformers.AutoModelForCausalLM.from_pretrained(sources.EMBEDDED).float().eval()
    calibration, test = (
        corpus.cut_windows(stdlib_docs.text(part), tokenizer, LENGTH, part) for part in ("calibration", "test")
    )
    batches = [states(model, batch) for batch in calibration[: 20 * BATCH].split(BATCH)]
    unseen = states(model, test[: 8 * BATCH])

    for name, settings in ROUTERS.items():
        torch.manual_seed(0)  # the same centroids for all
        router = settings.build(unseen.shape[1], EXPERTS, TOP_K).train()
        with torch.no_grad():
            for batch in batches:
                router.settle(router(batch))
            loads = router.eval()(unseen).loads().numpy()
        print(
            f"{name:15} largest load {load.max_violation(loads):.2f} above the mean, Gini {load.gini(loads):.2f}, "
            f"{int((loads == 0).sum())} of {EXPERTS} experts unused"
        )


if __name__ == "__main__":
    main()
