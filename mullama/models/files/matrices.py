"""The matrices of a model by type and shape: what ways of computing are chosen for."""

from __future__ import annotations

from collections import Counter

from mullama.machine.remembered import Weights
from mullama.models.files.gguf import TENSOR_TYPES, Header

#: Longest row that is tried; a header may name any number.
LONGEST_ROW = 1 << 17

#: Types that llama.cpp multiplies no weights of: it keeps columns in the first two, numbers of things in the others.
NEVER_WEIGHTS = frozenset(("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"))

#: Tables that rows are looked up in.
LOOKED_UP = frozenset(("position_embd.weight", "token_types.weight", "per_layer_token_embd.weight"))


def matrices(header: Header) -> list[Weights]:
    """What is multiplied with columns: the experts of a layer are one matrix each, an embedding that is only looked up
    is none. ``header``: with the tensors of all parts, as ``gguf.check()`` gives it.
    """
    looked_up = LOOKED_UP
    if any(tensor.name == "output.weight" for tensor in header.tensors):
        looked_up |= {"token_embd.weight"}
    shapes: Counter[tuple[int, int, int]] = Counter()
    for tensor in header.tensors:
        if tensor.type_id not in TENSOR_TYPES or len(tensor.shape) < 2 or not 0 < tensor.shape[0] <= LONGEST_ROW:
            continue
        if tensor.name in looked_up or tensor.type in NEVER_WEIGHTS:
            continue
        k, n, *more = tensor.shape
        count = 1
        for dim in more:
            count *= dim
        shapes[tensor.type_id, k, n] += count
    found = []
    for (kind, k, n), count in shapes.items():
        name, block, block_bytes = TENSOR_TYPES[kind]
        if n > 0 and count > 0 and k % block == 0:
            found.append(Weights(kind, name, block, block_bytes, k, n, count))
    return found
