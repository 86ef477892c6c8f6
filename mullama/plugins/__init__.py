"""What schedulers, KV policies, model sources and other seams share: groups by name, user code, parameters.

Internal.
"""
