"""Vectors of prompts: several prompts a ubatch, one decode, and nothing that stays in the context."""
