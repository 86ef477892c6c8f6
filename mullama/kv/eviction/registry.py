"""Eviction policies by name: built-in, from the entry-point group ``mullama.kv_policies``, or from a user's file."""

from __future__ import annotations

from mullama.kv.eviction.policy import EvictionPolicy
from mullama.plugins.foreign import Seam
from mullama.plugins.groups import PluginGroup
from mullama.plugins.policy_groups import PolicyGroup, names_code

__all__ = ["BUILTINS", "GROUP", "KV_POLICIES", "create", "names_code"]

#: The help of ``kv_policy`` in ``config.py`` lists them too.
BUILTINS = {
    "lru": "mullama.kv.eviction.lru:Lru",
    "lfu": "mullama.kv.eviction.lfu:Lfu",
    "fifo": "mullama.kv.eviction.fifo:Fifo",
    "cost": "mullama.kv.eviction.cost:Cost",
    "turns": "mullama.kv.eviction.turns:Turns",
}

KV_POLICIES = PluginGroup("mullama.kv_policies", "KV policy", BUILTINS)

GROUP: PolicyGroup[EvictionPolicy] = PolicyGroup(
    KV_POLICIES, BUILTINS, Seam("KV policy", ("score",), optional=("evicted",), param="kv_policy")
)
create = GROUP.create  # of a user's class only ``score`` is needed
