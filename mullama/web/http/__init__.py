"""HTTP as it is spoken: the protocol, connections, where the server listens, what stands before every route."""
