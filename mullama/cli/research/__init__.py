"""Commands that measure, simulate and compare policies."""
