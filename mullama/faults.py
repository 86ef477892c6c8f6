"""Named points at which a test may kill this process, to show that what is on disk survives it, and faults of trials.

Nothing here costs anything in service: the variable is read when a point is passed, a few times a pull or a swap.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "MULLAMA_CRASH_AT"
TRIAL_VARIABLE = "MULLAMA_TRIAL_FAULT"

#: Every point there is, in the order in which an action passes them.
POINTS: tuple[str, ...] = (
    "pull:start",  # the key is locked, nothing was asked of the network
    "pull:in-download",  # some bytes of a file are written, more are to come
    "pull:after-download",  # every byte is on disk, unverified
    "pull:after-verify",  # checksums and header are sound, the file lies in the temporary folder
    "pull:after-place",  # the file is among the blobs, no ref names it
    "pull:after-ref",  # the pull is done, its temporary folder and its lock are still there
    "load:before-weights",  # the file was checked, nothing of it is in memory
    "load:after-weights",  # the weights are there, no context
    "load:after-context",  # the engine could start
    "swap:after-load",  # the new weights are there, beside those that serve
    "swap:before-commit",  # KV has been copied, the old weights have taken their last step
    "swap:in-gap",  # the old weights are freed, the new ones are not loaded: memory did not hold both
    "swap:after-commit",  # the new weights are in charge, the old ones not freed
)


def crash_point(name: str) -> None:
    """Die by SIGKILL here when ``$MULLAMA_CRASH_AT`` names this point. Raises AssertionError for an unlisted name."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    assert name in POINTS, name
    if wanted == name:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


#: What a test may have a trial of a way of computing do: ``$MULLAMA_TRIAL_FAULT`` is WAY=FAULT, several with commas.
TRIAL_FAULTS = ("crash", "hang", "differ", "slow")


def trial_fault(way: str) -> str:
    """What the trial of this way is to do; "" in service. Raises AssertionError for an unlisted fault."""
    for part in os.environ.get(TRIAL_VARIABLE, "").split(","):
        name, _, fault = part.partition("=")
        if name == way:
            assert fault in TRIAL_FAULTS, fault
            return fault
    return ""
