"""Engines that make vectors of texts, and rank them: whole batches a step, nothing that stays."""
