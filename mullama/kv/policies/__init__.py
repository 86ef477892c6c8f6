"""The built-in eviction policies, one file each; ``mullama.kv.registry`` makes them by name."""
