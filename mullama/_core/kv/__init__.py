"""KV in and out of the slots."""
