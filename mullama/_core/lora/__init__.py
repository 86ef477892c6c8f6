"""LoRA adapters, and the sets of them that sequences use."""
