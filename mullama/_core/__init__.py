"""The compiled room: everything that touches llama.cpp. Importing it loads the shared libraries in mullama/lib.

model     weights, vocabulary, chat template
sampling  SamplingParams to a sampler chain
governor  thread count from measured step times
page      the writing side of the instrumentation page
loop      slots, batch, decode, sample, commit: the hot loop
cells     KV in and out of the slots: rows, checkpoints, copies
"""

from mullama._core.cells import Cells
from mullama._core.governor import Governor
from mullama._core.loop import FINISH, TEXT, Core, Parked, StopText
from mullama._core.model import Model, devices, llama_cpp_version, set_log_level, system_info
from mullama._core.page import Page
from mullama._core.sampling import check_params

__all__ = [
    "FINISH",
    "TEXT",
    "Cells",
    "Core",
    "Governor",
    "Model",
    "Page",
    "Parked",
    "StopText",
    "check_params",
    "devices",
    "llama_cpp_version",
    "set_log_level",
    "system_info",
]
