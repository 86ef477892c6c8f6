"""``usage`` and ``profile`` of a response, from the profiles of its choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mullama.types import Finish, Profile


def usage(prompt_lengths: Sequence[int], n: int, finishes: Sequence[Finish]) -> dict[str, Any]:
    """OpenAI's usage: every prompt counts once, every completion counts.

    ``cached_tokens`` of a prompt with several choices is the least of theirs: the tokens that nobody computed.
    """
    profiles = [finish.profile for finish in finishes]
    prompt_tokens = sum(prompt_lengths)
    completion_tokens = sum(profile.completion_tokens for profile in profiles)
    cached = sum(min(p.kv_cache_hit for p in profiles[at : at + n]) for at in range(0, len(profiles), n))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def profile_fields(finishes: Sequence[Finish]) -> dict[str, Any]:
    """``profile``, and with several choices also ``profiles``, one each in their order."""
    profiles = [finish.profile for finish in finishes]
    if len(profiles) == 1:
        return {"profile": profiles[0].to_dict()}
    return {"profile": total(profiles).to_dict(), "profiles": [profile.to_dict() for profile in profiles]}


def timings(finishes: Sequence[Finish]) -> dict[str, Any]:
    """llama-server's ``timings`` of all choices together."""
    p = finishes[0].profile if len(finishes) == 1 else total([finish.profile for finish in finishes])
    n, m = p.kv_cache_miss, p.completion_tokens
    return {
        "cache_n": p.kv_cache_hit,
        "prompt_n": n,
        "prompt_ms": round(p.prefill_ms, 3),
        "prompt_per_token_ms": round(p.prefill_ms / n, 3) if n else 0.0,
        "prompt_per_second": round(1e3 * n / p.prefill_ms, 3) if p.prefill_ms else 0.0,
        "predicted_n": m,
        "predicted_ms": round(p.decode_ms, 3),
        "predicted_per_token_ms": round(p.decode_ms / m, 3) if m else 0.0,
        "predicted_per_second": round(1e3 * m / p.decode_ms, 3) if p.decode_ms else 0.0,
    }


def total(profiles: Sequence[Profile]) -> Profile:
    """What all choices cost together: work adds up (a prompt counts for every choice that took it in, so that hit
    and miss still add up to it); waiting is the longest, the first token the earliest."""
    steps = sum(p.steps for p in profiles)
    first_tokens = [p.time_to_first_token_ms for p in profiles if p.time_to_first_token_ms is not None]
    return Profile(
        prompt_tokens=sum(p.prompt_tokens for p in profiles),
        completion_tokens=sum(p.completion_tokens for p in profiles),
        kv_cache_hit=sum(p.kv_cache_hit for p in profiles),
        kv_cache_miss=sum(p.kv_cache_miss for p in profiles),
        kv_cache_evict=sum(p.kv_cache_evict for p in profiles),
        queue_ms=max(p.queue_ms for p in profiles),
        prefill_ms=sum(p.prefill_ms for p in profiles),
        decode_ms=sum(p.decode_ms for p in profiles),
        sample_ms=sum(p.sample_ms for p in profiles),
        time_to_first_token_ms=min(first_tokens, default=None),
        total_ms=max(p.total_ms for p in profiles),
        steps=steps,
        mean_batch_size=sum(p.mean_batch_size * p.steps for p in profiles) / steps if steps else 0.0,
        threads_min=min(p.threads_min for p in profiles),
        threads_max=max(p.threads_max for p in profiles),
        preemptions=sum(p.preemptions for p in profiles),
        preempted_ms=max(p.preempted_ms for p in profiles),
        recomputed_tokens=sum(p.recomputed_tokens for p in profiles),
        kv_cache_source=profiles[0].kv_cache_source,
        kv_miss_reason=profiles[0].kv_miss_reason,
        context_shifted=sum(p.context_shifted for p in profiles),
        kv_bytes=sum(p.kv_bytes for p in profiles),
        kv_byte_seconds=sum(p.kv_byte_seconds for p in profiles),
        weights=profiles[0].weights,
        kernels=profiles[0].kernels,
        adapters=profiles[0].adapters,
    )
