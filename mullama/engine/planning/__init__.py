"""The scheduling policy of an engine: asked, watched, swapped live, shadowed, shown."""
