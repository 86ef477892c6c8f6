"""The scheduling policy of an engine: asked, watched, changed live, shadowed, shown."""
