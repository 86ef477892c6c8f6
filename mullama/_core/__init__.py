"""The compiled room: everything that touches llama.cpp. Importing it loads the shared libraries in mullama/lib.

Raises MachineUnfit where they need instructions that are not here (before any is loaded), are missing or do not load.

core       Core: a context with its slots, its threads, its page and the ring of records; the hot loop; parked sequences
output     the ring of records, its reader's wake-up, the writing side of the instrumentation page
compute    the thread pool, the turn among the engines of a process, the thread governor, deadlines
kv         KV in and out of the slots: rows, checkpoints, copies
weights    other weights under a running core, a core without weights for a while, how far two models are apart
model      weights, vocabulary, chat template; a llama.cpp context and its limits
constraint grammars of llguidance, and what holds texts to them
sampling   SamplingParams to a sampler chain
lora       LoRA adapters, and the sets of them that sequences use
embedding  vectors of prompts: several prompts a ubatch
kernels    ways of computing products of weights; llama.cpp's quantisation; both for processes of their own
testing    for tests only: parts of the core alone

What runs without the GIL and knows nothing of Python is C++: output.h, compute.h, slots.h, and what they are made of.
"""

# ruff: noqa: E402 - the checks come first
from mullama.installation import instructions, libraries

instructions.check()
libraries.check()

from mullama._core.compute.arbiter import Arbiter, arbiter
from mullama._core.compute.governor import Governor
from mullama._core.constraint.grammars import library as constraint_library
from mullama._core.core.core import FINISH, TEXT, Core
from mullama._core.core.parking import Parked
from mullama._core.embedding.embedder import Embedder
from mullama._core.kernels.quantization import quantize, quantize_types
from mullama._core.kv.cells import Cells
from mullama._core.lora.adapters import Adapter
from mullama._core.model.context import Context
from mullama._core.model.model import Model, chat_template_names, devices, llama_cpp_version, set_log_level, system_info
from mullama._core.output.page import Page
from mullama._core.sampling.chain import Sampling, check_params
from mullama._core.weights.carrier import Carrier
from mullama._core.weights.divergence import Divergence
from mullama._core.weights.vacancy import Vacancy

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
    "Embedder",
    "Governor",
    "Model",
    "Page",
    "Parked",
    "Sampling",
    "Vacancy",
    "arbiter",
    "chat_template_names",
    "check_params",
    "constraint_library",
    "devices",
    "llama_cpp_version",
    "quantize",
    "quantize_types",
    "set_log_level",
    "system_info",
]
