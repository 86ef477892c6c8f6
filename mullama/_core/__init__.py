"""The compiled room: everything that touches llama.cpp. Importing it loads the shared libraries in mullama/lib.

Raises MachineUnfit where they need instructions that are not here (before any is loaded), are missing or do not load.

model     weights, vocabulary, chat template
sampling  SamplingParams to a sampler chain
governor  thread count from measured step times
arbiter   whose turn it is to compute, among the engines of a process
page      the writing side of the instrumentation page
adapters  LoRA adapters, and the sets of them that sequences use
context   a llama.cpp context and its limits
machine   a context with its threads, its page and the ring of records
slots     sequences in a context, and their KV
parking   running sequences out of their slots and back in
loop      batch, decode, sample, commit: the hot loop
gate      parts of the loop alone, for tests
cells     KV in and out of the slots: rows, checkpoints, copies
swap      other weights under a running loop
vacancy   a loop without weights for a while
divergence  how far two models are apart
quantize  llama.cpp's quantisation, for a process of its own
kernels   ways of computing products of weights: which there are, trying and timing one, choosing
"""

# ruff: noqa: E402 - the checks come first
from mullama.installation import instructions, libraries

instructions.check()
libraries.check()

from mullama._core.adapters import Adapter
from mullama._core.arbiter import Arbiter, arbiter
from mullama._core.cells import Cells
from mullama._core.context import Context
from mullama._core.divergence import Divergence
from mullama._core.gate import StopText
from mullama._core.governor import Governor
from mullama._core.loop import Core
from mullama._core.machine import FINISH, TEXT
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
    "StopText",
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
