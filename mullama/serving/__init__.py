"""The models of a server: which are loaded, who uses them, who has to go, and how one takes another's place.

Internal but for the protocol in ``model_eviction.py``.
"""
