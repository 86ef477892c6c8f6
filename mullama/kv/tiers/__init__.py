"""Where cached KV lies when no slot holds it: host memory, and files on disk."""
