"""Ollama's API: ``/api``, over the same requests as OpenAI's, streamed as a JSON object a line."""
