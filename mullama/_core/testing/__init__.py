"""Parts of the core alone, for tests only: nothing of the product imports it."""
