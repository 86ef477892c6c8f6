from typing import TypedDict

class Library(TypedDict):
    version: str | None
    problem: str | None

def library() -> Library: ...

class Grammar: ...
class Vocabulary: ...
