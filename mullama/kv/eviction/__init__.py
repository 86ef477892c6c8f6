"""Who goes first: the protocol of eviction policies, the built-in ones, a file each, the guard around foreign ones."""
