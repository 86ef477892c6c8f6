"""What is cached: the prefix tree, what its nodes hold, what keeps tenants apart, what was there once."""
