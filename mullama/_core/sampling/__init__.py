"""From a request's parameters to a sampler chain."""
