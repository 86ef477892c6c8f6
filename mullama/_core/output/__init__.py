"""What the engine thread tells: the ring of records, its reader's wake-up, and the instrumentation page."""
