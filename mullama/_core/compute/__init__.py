"""What computes: the thread pool, the turn among engines, the governor, deadlines."""
