"""From the folder of a model as it was trained to the GGUF that is served: weights, vocabulary, settings."""
