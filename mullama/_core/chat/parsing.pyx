"""How an answer is read: see parsing.pxd."""

from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

import json

#: What a part of an answer is, by the number of ``AnswerDelta::Kind``.
KINDS = ("reasoning", "content", "call", "arguments")


cdef class AnswerFormat:
    """What a chat's template says of the answer. ``facts``: see ChatOpened in chat_shim.h."""

    def __init__(self):
        raise TypeError("Model.open_chat makes formats")

    def parser(self):
        """For one answer."""
        cdef AnswerParser made = AnswerParser.__new__(AnswerParser)
        made.parser.reset(new Parser(self.format))
        return made


cdef AnswerFormat make_format(shared_ptr[Format] format, const string & facts):
    cdef AnswerFormat made = AnswerFormat.__new__(AnswerFormat)
    cdef bytes text = facts
    made.format = format
    made.facts = json.loads(text)
    return made


cdef list _parts(const vector[Delta] & deltas):
    cdef size_t i
    return [
        (KINDS[deltas[i].kind], deltas[i].index, deltas[i].text.decode("utf-8", "replace"),
         deltas[i].id.decode("utf-8", "replace"))
        for i in range(deltas.size())
    ]


cdef class AnswerParser:
    """Reads one answer, piece by piece. What it has told is never taken back."""

    def __init__(self):
        raise TypeError("AnswerFormat.parser makes parsers")

    def feed(self, str text):
        """What is new with the next piece: tuples of kind, index of the call, text, and the id that the model gave it.

        Kinds: ``reasoning``, ``content``, ``call`` (the text is the function's name), ``arguments`` (of the latest
        call). The GIL is released.
        """
        cdef string piece = text.encode("utf-8", "replace")
        cdef vector[Delta] deltas
        with nogil:
            self.parser.get().feed(piece, deltas)
        return _parts(deltas)

    def finish(self):
        """The same of what had been held back; the answer has ended."""
        cdef vector[Delta] deltas
        with nogil:
            self.parser.get().finish(deltas)
        return _parts(deltas)

    @property
    def size(self):
        """Bytes that the next call may have to read again."""
        return self.parser.get().size()

    @property
    def contradictions(self):
        """How often a parse contradicted what had been told; for tests."""
        return self.parser.get().contradictions()
