"""One turn for all engines of a process: no two graphs compute at the same time.

An engine holds the turn for one step and hands it on to whoever the policy names among those that wait: the one that
waits longest (``round_robin``), the one with the least compute time for its weight (``weighted``), or the one with the
highest priority (``priority``). A single engine pays for it with an uncontended lock a step.
"""

from libc.stdint cimport uint64_t
from libcpp.vector cimport vector

import os

from mullama.errors import InvalidRequest

POLICIES = ("round_robin", "weighted", "priority")


cdef class Arbiter:
    """See the module. Every method may be called from any thread."""

    def __cinit__(self):
        self.table.reset(new TurnTable())

    def renew(self):
        """Begin anew in a child process: whoever held the turn, or the lock, when the parent forked is not here.

        What was is left as it is, never freed: it may be locked. No seat of the parent's gets a number again.
        """
        cdef TurnTable * old = self.table.release()
        self.table.reset(new TurnTable(old.taken()))
        self.table.get().set_policy(old.get_policy())

    @property
    def policy(self):
        """Name of the policy in charge."""
        return POLICIES[self.table.get().get_policy()]

    @policy.setter
    def policy(self, name):
        if name not in POLICIES:
            raise InvalidRequest(f"the arbiter has no policy '{name}'; there are {', '.join(POLICIES)}", param="policy")
        self.table.get().set_policy(POLICIES.index(name))

    def busy_beside(self, int seat, double seconds):
        """Whether another engine has computed within the last ``seconds``."""
        return self.table.get().busy_beside(seat, <uint64_t> (seconds * 1e9))

    def set_share(self, int seat, *, double weight=1.0, int priority=0):
        """What an engine may expect: ``weight`` (0.01 to 100) under ``weighted``, ``priority`` under ``priority``.

        Raises ValueError for a seat that nobody has, InvalidRequest for a weight out of range.
        """
        if not 0.01 <= weight <= 100:
            raise InvalidRequest(f"a weight must be 0.01 to 100, got {weight}", param="weight")
        if not self.table.get().share(seat, weight, priority):
            raise ValueError(f"no engine has the seat {seat}")

    def seats(self):
        """By seat: weight, priority, turns taken, ns computed and waited, and whether it waits now."""
        cdef vector[SeatUse] uses = self.table.get().uses()
        cdef size_t i
        found = {}
        for i in range(uses.size()):
            found[uses[i].id] = {
                "weight": uses[i].weight, "priority": uses[i].priority, "turns": uses[i].turns,
                "used_ns": uses[i].used_ns, "wait_ns": uses[i].wait_ns, "is_waiting": bool(uses[i].is_waiting),
            }
        return found


#: The one of this process.
arbiter = Arbiter()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=arbiter.renew)
