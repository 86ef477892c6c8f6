"""One request inside an engine: its prompt, its life, its tokens on their way to whoever reads them."""
