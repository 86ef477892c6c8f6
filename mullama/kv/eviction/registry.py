"""Eviction policies by name: built-in, from the entry-point group ``mullama.kv_policies``, or from a user's file."""

from __future__ import annotations

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

_GROUP: PolicyGroup[EvictionPolicy] = PolicyGroup(
    KV_POLICIES, BUILTINS, Seam("KV policy", ("score",), optional=("evicted",), param="kv_policy")
)

#: See the methods of these names. Of a user's class only ``score`` is needed.
is_builtin, names, create = _GROUP.is_builtin, _GROUP.names, _GROUP.create
describe, describe_all = _GROUP.describe, _GROUP.describe_all
