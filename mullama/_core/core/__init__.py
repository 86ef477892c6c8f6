"""A context with its slots, and the loop that computes them."""
