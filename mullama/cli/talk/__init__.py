"""Commands that answer on the terminal."""
