"""Commands on the models of this disk."""
