"""KV cache policies: where a sequence goes, what is kept, what is given up. Decisions only; ``_core`` moves cells."""
