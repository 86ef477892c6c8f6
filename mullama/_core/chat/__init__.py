"""llama.cpp's chat templates: prompts, and how answers are read."""
