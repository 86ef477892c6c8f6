"""Other weights under a core, none for a while, and how far two models are apart."""
