"""Where models come from: one file a source, and what fetching has in common."""
