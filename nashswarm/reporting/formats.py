"""How a number is written: one format a metric, in the unit of its column.

A number is formatted here and nowhere else, so that the terminal, the README, and the paper's tables and prose agree.
"""

from collections.abc import Callable

MISSING = "-"
MARK = "†"  # a difference that survives its test
UNCLEAN = "‡"  # code that was not committed, or is unknown
OFFICIAL = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}


def fixed(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """Return a formatter: ``digits`` decimals after multiplication by ``scale``, with commas between thousands."""
    return lambda value: format(value * scale, f"z,.{digits}f")


def signed(digits: int, scale: float = 1.0) -> Callable[[float], str]:
    """Return a formatter for differences, which always shows the sign."""
    return lambda value: format(scale * value, f"+z.{digits}f")


def scientific(value: float) -> str:
    """Write two significant digits and a power of ten, for values over many orders of magnitude; zero is ``0``."""
    return "0" if value == 0 else format(value, ".1e")


def signed_scientific(value: float) -> str:
    """Write two significant digits and a power of ten, always with the sign."""
    return "0" if value == 0 else format(value, "+.1e")


FORMATS: dict[str, Callable[[float], str]] = {
    "bits_per_weight_model": fixed(2),
    "bits_per_weight": fixed(2),
    "nominal_bits": fixed(2),
    "bytes_file": fixed(2, 1e-6),
    "compression": fixed(1, 100.0),
    "perplexity": fixed(2),
    "perplexity_low": fixed(2),
    "perplexity_high": fixed(2),
    "nll": fixed(4),
    "nll_spread": fixed(4),
    "nll_delta": signed(4),
    "nll_delta_low": signed(4),
    "nll_delta_high": signed(4),
    "kl": fixed(4),
    "kl_low": fixed(4),
    "kl_high": fixed(4),
    "kl_before": fixed(4),
    "kl_before_low": fixed(4),
    "kl_before_high": fixed(4),
    "nll_delta_before": signed(4),
    "nll_delta_before_low": signed(4),
    "nll_delta_before_high": signed(4),
    "kl_p": scientific,
    "nll_delta_p": scientific,
    "kl_spread": fixed(4),
    "nll_delta_spread": fixed(4),
    "kl_at_bytes": fixed(4),
    "kl_ratio": fixed(3),
    "kl_ratio_low": fixed(3),
    "kl_ratio_high": fixed(3),
    "layer_kl": scientific,
    "layer_kl_low": scientific,
    "layer_kl_high": scientific,
    "layer_nll_delta": signed_scientific,
    "top1_agreement": fixed(1, 100.0),
    **{f"{name}{suffix}": fixed(1, 100.0) for name in OFFICIAL for suffix in ("", "_full")},
    **{f"{name}_delta": signed(1, 100.0) for name in OFFICIAL},
    "examples": fixed(0),
    "tokens": fixed(0),
    "windows": fixed(0),
    "parameters": fixed(0),
    "damage": fixed(4),
    "damage_pearson": fixed(3),
    "damage_spearman": fixed(3),
    "layer_damage": scientific,
    "bleu": fixed(1),
    "bleu_low": fixed(1),
    "bleu_high": fixed(1),
    "bleu_text": fixed(1),
    "bleu_text_low": fixed(1),
    "bleu_text_high": fixed(1),
    "bleu_text_full": fixed(1),
    "regret_max": scientific,
    "regret_mean": scientific,
    "potential_start": fixed(4),
    "potential_end": fixed(4),
    "price": scientific,
    "sweeps": fixed(0),
    "flock_moves": fixed(0),
    "quantize_seconds": fixed(1),
    "bytes_file_before": fixed(2, 1e-6),
    "finetune_seconds": fixed(1),
    "finetune_steps": fixed(0),
    "finetune_chosen_step": fixed(0),
    "seconds": fixed(1),
    "peak_bytes": fixed(0, 1e-6),
    "quantize_peak_bytes": fixed(0, 1e-6),
    "bytes_resident": fixed(2, 1e-6),
    "decode_ms": fixed(2),
    "decode_ratio": fixed(2),
    "decode_long_ratio": fixed(2),
    "prefill_ratio": fixed(2),
    "prefill_tokens_per_second": fixed(0),
    "seeds": fixed(0),
    "threads": fixed(0),
    "nll_to_top_k": signed(4),
    "nll_to_top_k_spread": fixed(4),
    "served_tokens_per_second": fixed(0),
    "served_tokens_per_second_without": fixed(0),
    "max_violation": fixed(3),
    "max_violation_following": fixed(3),
    "max_violation_worst": fixed(3),
    "price_rate": fixed(2),
    "price_window": fixed(0),
    "nll_following": fixed(4),
    "load_gini": fixed(3),
    "load_cv": fixed(3),
    "dead_experts": fixed(1),
    "dropped": fixed(1, 100.0),
    "resident_hits": fixed(1, 100.0),
    "resident_hits_without": fixed(1, 100.0),
    "token_microseconds": fixed(1),
    "router_microseconds": fixed(2),
    "looks_ahead": fixed(0),
    "bytes_memory": fixed(2, 1e-6),
    "nll_quantized": fixed(4),
    **{f"latency_ms{suffix}": fixed(2) for suffix in ("", "_quantized")},
    **{f"tokens_per_second{suffix}": fixed(0) for suffix in ("", "_quantized")},
    **{f"latency_p{level}_ms{suffix}": fixed(0) for level in (50, 95, 99) for suffix in ("", "_full")},
    "latency_p95_ratio": fixed(2),
    "tokens_per_second_full": fixed(0),
    "clients": fixed(0),
    "requests": fixed(0),
    "rate": fixed(1),
    **{name: fixed(1, 100.0) for name in ("shed_rate", "error_rate", "resident_spread", "resident_spread_full")},
    "experts": fixed(0),
    **{f"route_{version}": fixed(2) for version in ("plain", "flock", "leaders", "first")},
    **{f"share_{part}": fixed(0, 100.0) for part in ("scores", "choice")},
    "layer_ratio_alone": fixed(2),
    "layer_ratio_all": fixed(2),
}
