"""A language model like GPT-2 whose feed-forward layers are mixtures of experts.

Importing this module registers it with transformers, so that ``AutoModelForCausalLM`` opens saved models.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from nashswarm.models.experts import Experts
from nashswarm.moe.attention import Attention
from nashswarm.moe.router import kinds
from nashswarm.moe.router.dense import DenseTotal
from nashswarm.moe.router.router import Router, RouterSettings
from nashswarm.moe.routing import Routing


@dataclasses.dataclass(frozen=True)
class MoeSource:
    """The shape of a mixture of experts that is to be trained.

    ``width``: of the residual stream.  ``expert_width``: hidden units of one expert.  ``experts``: per layer.
    ``top_k``: experts that a token uses.  ``context``: the longest window, in tokens.
    """

    width: int = 128
    layers: int = 3
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    context: int = 128

    def __post_init__(self) -> None:
        sizes = [getattr(self, field.name) for field in dataclasses.fields(MoeSource)]
        if min(sizes) < 1 or self.width % self.heads:
            raise ValueError(
                f"every size of the model must be at least 1, and model.width={self.width} a multiple of "
                f"model.heads={self.heads}"
            )
        if self.top_k > self.experts:
            raise ValueError(f"model.top_k={self.top_k} is not between 1 and model.experts={self.experts}")

    @property
    def label(self) -> str:
        """Return the name of the shape in records."""
        return f"moe_{self.experts}x{self.expert_width}_top{self.top_k}"

    def build(self, router: RouterSettings, vocabulary: int, end_token: int) -> "MoeForCausalLM":
        """Return a model with fresh weights, drawn from torch's random numbers."""
        return MoeForCausalLM(self.config(router, vocabulary, end_token))

    def config(self, router: RouterSettings, vocabulary: int, end_token: int) -> "MoeConfig":
        """Return the configuration of the model as transformers saves it."""
        return MoeConfig(
            vocab_size=vocabulary, hidden_size=self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_experts=self.experts, num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.expert_width, max_position_embeddings=self.context,
            router=kinds.describe(router), bos_token_id=end_token, eos_token_id=end_token,
        )  # fmt: skip


class MoeConfig(transformers.PretrainedConfig):
    """The configuration of the model as transformers saves it; ``router``: as ``kinds.describe`` describes it."""

    model_type = "nashswarm_moe"

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 128,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int = 128,
        max_position_embeddings: int = 128,
        num_shared_experts: int = 0,
        router: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.moe_intermediate_size, self.num_shared_experts = moe_intermediate_size, num_shared_experts
        self.router = dict(router or {"kind": "NashSwarmRouter"})
        others.setdefault("tie_word_embeddings", True)
        super().__init__(**others)

    def settings(self) -> RouterSettings:
        """Return the settings of the router.  Raises ValueError if its kind is unknown."""
        return kinds.from_description(self.router)


@dataclasses.dataclass
class MoeOutput(CausalLMOutputWithPast):
    """Logits, loss and cache as in transformers, and the routing of every layer that routes."""

    routings: tuple[Routing, ...] | None = None


class Mixture(nn.Module):
    """The feed-forward layer of a mixture: a router and its experts, and what every token uses if experts are shared.

    Shared experts are one network as wide as all of them, which computes the same (Dai et al. 2024, DeepSeekMoE).
    """

    def __init__(self, config: MoeConfig, router: Router) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
        self.shared = None
        if config.num_shared_experts:
            self.shared = FeedForward(config, config.num_shared_experts)

    def forward(self, x: Float[Tensor, "batch length width"]) -> tuple[Tensor, Routing | None]:
        flat = x.flatten(0, 1)
        routing = self.router(flat)
        if routing.tokens is None:
            out = self.experts(flat, routing.experts, routing.gates)
        else:
            assigned = self.experts(flat[routing.tokens], routing.experts, routing.gates)
            out = torch.zeros_like(flat).index_add(0, routing.tokens, assigned)
        out = out.view_as(x)
        return out if self.shared is None else out + self.shared(x)[0], routing


class FeedForward(nn.Module):
    """A dense feed-forward layer as wide as ``experts`` of them; by default as those that a token would use."""

    def __init__(self, config: MoeConfig, experts: int | None = None) -> None:
        super().__init__()
        if experts is None:
            experts = config.num_experts_per_tok + config.num_shared_experts
        hidden = experts * config.moe_intermediate_size
        self.up = nn.Linear(config.hidden_size, hidden, bias=False)
        self.down = nn.Linear(hidden, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch length width"]) -> tuple[Tensor, Routing | None]:
        return self.down(Experts.act_fn(self.up(x))), None


def feed_forward(config: MoeConfig, settings: RouterSettings) -> Mixture | FeedForward:
    """Return the feed-forward layer with fresh weights: a mixture, or dense where the settings build no router."""
    router = settings.build(config.hidden_size, config.num_experts, config.num_experts_per_tok)
    if router is not None:
        return Mixture(config, router)
    total = config.num_experts + config.num_shared_experts
    return FeedForward(config, total if isinstance(settings, DenseTotal) else None)


class Block(nn.Module):
    """A layer of the transformer: attention, then a feed-forward layer."""

    def __init__(self, config: MoeConfig, layer: int, settings: RouterSettings) -> None:
        super().__init__()
        self.norm_attention, self.norm_mixture = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.attention = Attention(config.hidden_size, config.num_attention_heads, layer)
        self.mixture = feed_forward(config, settings)

    def forward(self, x: Tensor, past: Cache | None) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.norm_attention(x), past)
        out, routing = self.mixture(self.norm_mixture(x))
        return x + out, routing


class MoeForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Token and position embeddings, blocks of attention and experts, and a head that is the token embedding."""

    config_class = MoeConfig
    config: MoeConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"head.weight": "tokens.weight"}  # noqa: RUF012  as transformers declares it
    _supports_sdpa = True

    def __init__(self, config: MoeConfig) -> None:
        super().__init__(config)
        settings = config.settings()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer, settings) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """Draw weights as GPT-2 does: deviation 0.02, divided by √(2 · layers) where a product joins the residuals."""
        shrunk = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Router):
            module.reset()
        elif isinstance(module, Experts):
            nn.init.normal_(module.up_proj, std=0.02)
            nn.init.normal_(module.down_proj, std=shrunk)
        if isinstance(module, FeedForward):
            nn.init.normal_(module.down.weight, std=shrunk)
        elif isinstance(module, Attention):
            nn.init.normal_(module.out.weight, std=shrunk)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_input_embeddings(self, module: Any) -> None:
        self.tokens = module

    def set_output_embeddings(self, module: Any) -> None:
        self.head = module

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        logits_to_keep: int = 0,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> MoeOutput:
        """Return logits, the loss in nats per token if ``labels`` are given, and the routings of all layers.

        Raises ValueError for padded texts: padding would take part in attention and in routing.
        """
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("this model reads no padding: give it texts of one length, or one at a time")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        place = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(place)
        routings = []
        for block in self.blocks:
            x, routing = block(x, past_key_values)
            if routing is not None:
                routings.append(routing)
        logits = self.head(self.norm(x)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return MoeOutput(loss=loss, logits=logits, past_key_values=past_key_values, routings=tuple(routings))

    def settle(self, routings: Sequence[Routing], step: float | None = None) -> None:
        """Move the prices of all layers after a batch of training; ``step``: as in ``Router.settle``."""
        for router, routing in zip(self.routers(), routings, strict=True):
            router.settle(routing, step)

    def follow(self, routings: Sequence[Routing]) -> None:
        """Move the prices of all layers after a batch that was evaluated."""
        for router, routing in zip(self.routers(), routings, strict=True):
            router.follow(routing)

    def routers(self) -> list[Router]:
        """Return the routers in the order of the layers; a dense model has none."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @property
    def active_parameters(self) -> int:
        """Return the number of parameters that take part in one token."""
        total = sum(parameter.numel() for parameter in self.parameters())
        unused = 1 - self.config.num_experts_per_tok / self.config.num_experts
        pools = [part for module in self.modules() if isinstance(module, Experts) for part in module.parameters()]
        return total - round(unused * sum(part.numel() for part in pools))


transformers.AutoConfig.register(MoeConfig.model_type, MoeConfig)
transformers.AutoModelForCausalLM.register(MoeConfig, MoeForCausalLM)
