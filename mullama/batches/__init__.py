"""Files that clients upload, and batches of requests from them. Internal: nothing here is for others to build on."""
