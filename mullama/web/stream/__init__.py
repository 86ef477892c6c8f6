"""From the generations of a request to the bytes of its response."""
