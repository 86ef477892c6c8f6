"""References, sources, the store, and what a GGUF file says of itself. No compiled code.

``parse`` reads what a user wrote, ``sources`` fetches it, ``store`` keeps what was fetched, ``files`` reads what model
files say of themselves, ``child`` opens them where a crash does no harm.

Internal but for the protocols in ``sources/base.py``.
"""
