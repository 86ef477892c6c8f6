"""The weights of an engine: loaded, changed while it serves, put to sleep, compared, with LoRA adapters on them."""
