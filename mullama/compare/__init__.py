"""One workload against several policies on the real engine: played, measured, recorded, reported. Internal."""
