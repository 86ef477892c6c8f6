"""Vectors of texts and ranks of pairs: embeddings, rerank, score, over one kind of engine request."""
