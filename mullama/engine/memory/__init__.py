"""What an engine takes in memory: before it is loaded, and while it runs."""
