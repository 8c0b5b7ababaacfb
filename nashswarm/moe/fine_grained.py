"""Fine-grained and shared experts (Dai et al. 2024, DeepSeekMoE), at the active and the total size of plain ones."""

import dataclasses

from nashswarm.moe.model import MoeConfig, MoeSource
from nashswarm.moe.router.router import RouterSettings


@dataclasses.dataclass(frozen=True)
class FineMoeSource(MoeSource):
    """The shape of a mixture whose experts are cut into parts, of which some are shared by all tokens.

    ``parts``: that each of ``experts`` is cut into; a token uses as many times more of them.  ``shared``: parts that
    every token uses; its router chooses so many fewer, among so many fewer.  Centroids of the router aside, neither
    changes how many weights the model has or a token uses.  Raises ValueError where the router would have nothing left
    to choose.
    """

    parts: int = 2
    shared: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parts < 1 or self.expert_width % self.parts:
            raise ValueError(
                f"model.parts={self.parts} must be at least 1 and divide model.expert_width={self.expert_width}"
            )
        if not 0 <= self.shared < self.parts * self.top_k:
            raise ValueError(
                f"model.shared={self.shared} is not between 0 and {self.parts * self.top_k - 1}, one less than the "
                "parts of experts that a token uses"
            )

    @property
    def label(self) -> str:
        """Return the name of the shape in records."""
        return f"{super().label}_parts{self.parts}_shared{self.shared}"

    def config(self, router: RouterSettings, vocabulary: int, end_token: int) -> MoeConfig:
        """Return the configuration of the model as transformers saves it."""
        config = super().config(router, vocabulary, end_token)
        config.num_experts = self.parts * self.experts - self.shared
        config.num_experts_per_tok = self.parts * self.top_k - self.shared
        config.moe_intermediate_size = self.expert_width // self.parts
        config.num_shared_experts = self.shared
        return config
