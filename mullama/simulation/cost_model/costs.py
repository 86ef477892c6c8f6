"""What one engine step costs on a machine, as ``mullama calibrate`` measured it.

Tables, not formulas: on a CPU the cost of a matrix product goes up in steps with the number of rows (kernels work on
4, 8 or 16 at a time), and attention takes other paths from 512 cells and from 64 prompt tokens on. A polynomial through
that is wrong by a tenth where most steps are, at one to eight rows; a table is right at every point that was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from mullama.errors import ConfigError
from mullama.files import read_file, write_text
from mullama.scheduling import Costs
from mullama.simulation.cost_model.grid import Grid

FORMAT = "mullama-costs"
VERSION = 1
PAD = 256  # llama.cpp pads the cells that a graph attends to
BUCKET = 32  # cells for which a decode step is taken to cost the same


def padded(cells: int) -> int:
    """The cells that a graph is built for: at least ``cells``."""
    return -(-cells // PAD) * PAD


class CostModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Times in ns. A file of it says in ``about`` where it comes from: model, machine, date, threads, sizes."""

    format: str = FORMAT
    version: int = VERSION
    about: dict[str, Any] = {}
    decode: Grid  # x: sequences in the ubatch, y: mean cells each attends to
    prefill: Grid  # x: tokens of the chunk, y: tokens before it; with the logits of its last token
    masked_cell_ns: float = 0.0  # a cell that a row passes over because another row is longer
    output_ns: float = 0.0  # what a chunk that does not end its prompt saves
    rebuild_ns: float = 0.0  # a graph of another shape than the last one
    greedy_ns: float = 0.0  # a token chosen, its text assembled and handed over
    sampled_ns: float = 0.0  # the same with the default samplers
    step_ns: float = 0.0  # a step, beside its decodes and tokens
    token_ns: float = 0.0  # a token a step more that readers are woken for
    plan_ns: float = 0.0  # a plan and all the Python around it
    admit_ns: float = 0.0  # a request put into a slot
    wake_ns: float = 0.0  # from an arrival at an idle engine to its plan
    deliver_ns: float = 0.0  # from the end of a step to its client
    save_token_ns: float = 0.0  # KV of one token to host memory
    restore_token_ns: float = 0.0  # and back

    def __post_init__(self) -> None:
        if self.format != FORMAT or self.version != VERSION:
            raise ValueError(
                f"format {self.format} {self.version} is not {FORMAT} {VERSION}, which is what mullama reads"
            )
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name.endswith("_ns") and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not below 0")

    @classmethod
    def flat(cls, *, prefill_token_ns: float, decode_step_ns: float, swap_token_ns: float = 0.0) -> CostModel:
        """The coarse model of an engine's own live figures (``Costs``): a step costs the same for any sequences."""
        pass_ns = decode_step_ns or prefill_token_ns
        chunk_ns = max(prefill_token_ns * PAD, pass_ns)
        return cls(
            about={"source": "the engine's running averages"},
            decode=Grid([1.0], [0.0], [[pass_ns]]),
            prefill=Grid([1.0, float(PAD)], [0.0], [[pass_ns], [chunk_ns]]),
            save_token_ns=swap_token_ns / 2,
            restore_token_ns=swap_token_ns / 2,
        )

    def decode_ns(self, rows: int, cells: int, longest: int) -> int:
        """One token of ``rows`` sequences that attend to ``cells`` on average, the longest of them to ``longest``."""
        masked = max(padded(longest) - padded(cells), 0) * rows
        return round(self.decode.at(rows, cells) + masked * self.masked_cell_ns)

    def prefill_ns(self, tokens: int, before: int, *, final: bool = True) -> int:
        """A chunk of ``tokens`` behind ``before`` others; ``final``: it ends the prompt."""
        cost = self.prefill.at(tokens, before)
        return round(cost if final else max(cost - self.output_ns, 0.0))

    def move_ns(self, tokens: int) -> int:
        """Another slot for the KV of ``tokens``."""
        return round(tokens * (self.save_token_ns + self.restore_token_ns))

    def costs(self, rows: int, cells: int, n_batch: int) -> Costs:
        """What a policy is told."""
        return Costs(
            prefill_token_ns=self.prefill.at(n_batch, 0) / n_batch,
            decode_step_ns=self.decode.at(max(rows, 1), cells),
            swap_token_ns=self.save_token_ns + self.restore_token_ns,
        )


def read_costs(path: Path) -> CostModel:
    """Read what ``mullama calibrate`` wrote (``-``: from stdin). Raises ConfigError that says what is wrong with it."""
    try:
        return msgspec.json.decode(read_file(path), type=CostModel)
    except OSError as error:
        reason = f"cannot read the cost file {path}: {error.strerror}"
    except msgspec.ValidationError as error:
        reason = f"{path} is not a cost file of mullama: {error}"
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        reason = f"{path} is not JSON; mullama calibrate writes cost files"
    raise ConfigError(reason, param="costs")


def write_costs(path: Path, costs: CostModel) -> None:
    """Write a cost file (``-``: to stdout), so that ``read_costs`` gives an equal model."""
    write_text(path, msgspec.json.format(msgspec.json.encode(costs), indent=1).decode() + "\n")
