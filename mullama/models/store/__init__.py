"""The models on this disk: verified files, how they come in, and how they are looked after."""
