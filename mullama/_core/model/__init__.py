"""llama.cpp's model and context: weights, vocabulary, chat templates, limits."""
