"""Eviction policies by name: built-in, from the entry-point group ``mullama.kv_policies``, or from a user's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mullama.kv.eviction.policy import EvictionPolicy
from mullama.plugins.foreign import Seam
from mullama.plugins.groups import PluginGroup
from mullama.plugins.policy_groups import PolicyGroup, names_code

__all__ = ["BUILTINS", "KV_POLICIES", "create", "describe", "describe_all", "is_builtin", "names", "names_code"]

BUILTINS = {
    "lru": "mullama.kv.eviction.lru:Lru",
    "lfu": "mullama.kv.eviction.lfu:Lfu",
    "fifo": "mullama.kv.eviction.fifo:Fifo",
    "cost": "mullama.kv.eviction.cost:Cost",
    "turns": "mullama.kv.eviction.turns:Turns",
}

KV_POLICIES = PluginGroup("mullama.kv_policies", "KV policy", BUILTINS)

_GROUP = PolicyGroup(KV_POLICIES, BUILTINS, Seam("KV policy", ("score",), optional=("evicted",), param="kv_policy"))


def is_builtin(spec: str) -> bool:
    """Whether the policy is one of mullama's own."""
    return _GROUP.is_builtin(spec)


def names() -> list[str]:
    """Every registered name, built-ins first."""
    return _GROUP.names()


def create(spec: str, params: Mapping[str, Any] | None = None) -> EvictionPolicy:
    """A new policy: see :meth:`PolicyGroup.create`. Of a user's class only ``score`` is needed."""
    return cast(EvictionPolicy, _GROUP.create(spec, params))


def describe(spec: str) -> dict[str, Any]:
    """What a policy is: see :meth:`PolicyGroup.describe`."""
    return _GROUP.describe(spec)


def describe_all() -> list[dict[str, Any]]:
    """Every registered policy: see :meth:`PolicyGroup.describe_all`."""
    return _GROUP.describe_all()
