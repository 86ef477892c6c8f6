"""What is told to the world outside about the engine's work, as it happens. Internal."""
