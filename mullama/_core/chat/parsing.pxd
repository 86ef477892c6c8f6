"""How an answer is read: what a template says of it, and the parser of one answer (answer_parser.h).

A format is immutable, and shared by whoever reads answers of it; it needs no model. A parser belongs to one answer and
is used by one thread at a time.
"""

from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector


cdef extern from "answer_parser.h" namespace "mullama" nogil:
    cppclass Format "const mullama::AnswerFormat":
        pass
    cppclass Delta "mullama::AnswerDelta":
        int kind
        int index
        string text
        string id
    cppclass Parser "mullama::AnswerParser":
        Parser(shared_ptr[Format] format) except +
        void feed(const string & piece, vector[Delta] & out)
        void finish(vector[Delta] & out)
        size_t size()
        int contradictions()


cdef class AnswerFormat:
    cdef shared_ptr[Format] format
    cdef readonly dict facts


cdef class AnswerParser:
    cdef unique_ptr[Parser] parser


cdef AnswerFormat make_format(shared_ptr[Format] format, const string & facts)
