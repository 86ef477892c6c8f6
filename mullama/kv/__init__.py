"""KV cache policies: where a sequence goes, what is kept, what is given up. Decisions only; ``_core`` moves cells.

Internal but for the protocol in ``eviction/policy.py``.
"""
