"""The compiled room: everything that touches llama.cpp. Importing it loads the shared libraries in mullama/lib.

Raises MachineUnfit where they need instructions that are not here (before any is loaded), are missing or do not load.

core       Core: a context with its slots, its threads, its page and the ring of records
loop       batch, decode, sample, commit: the hot loop
parking    running sequences out of their slots and back in
cells      KV in and out of the slots: rows, checkpoints, copies
swap       other weights under a running core
vacancy    a core without weights for a while
divergence how far two models are apart
model      weights, vocabulary, chat template
context    a llama.cpp context and its limits
sampling   SamplingParams to a sampler chain
adapters   LoRA adapters, and the sets of them that sequences use
governor   thread count from measured step times
arbiter    whose turn it is to compute, among the engines of a process
page       the writing side of the instrumentation page
quantize   llama.cpp's quantisation, for a process of its own
kernels    ways of computing products of weights: which there are, trying and timing one, choosing
gate       for tests only: parts of the core alone

What runs without the GIL and knows nothing of Python is C++: output.h, compute.h, slots.h, and what they are made of.
"""

# ruff: noqa: E402 - the checks come first
from mullama.installation import instructions, libraries

instructions.check()
libraries.check()

from mullama._core.adapters import Adapter
from mullama._core.arbiter import Arbiter, arbiter
from mullama._core.cells import Cells
from mullama._core.context import Context
from mullama._core.core import FINISH, TEXT, Core
from mullama._core.divergence import Divergence
from mullama._core.governor import Governor
from mullama._core.model import Model, chat_template_names, devices, llama_cpp_version, set_log_level, system_info
from mullama._core.page import Page
from mullama._core.parking import Parked
from mullama._core.quantize import quantize, quantize_types
from mullama._core.sampling import Sampling, check_params
from mullama._core.swap import Carrier
from mullama._core.vacancy import Vacancy

__all__ = [
    "FINISH",
    "TEXT",
    "Adapter",
    "Arbiter",
    "Carrier",
    "Cells",
    "Context",
    "Core",
    "Divergence",
    "Governor",
    "Model",
    "Page",
    "Parked",
    "Sampling",
    "Vacancy",
    "arbiter",
    "chat_template_names",
    "check_params",
    "devices",
    "llama_cpp_version",
    "quantize",
    "quantize_types",
    "set_log_level",
    "system_info",
]
