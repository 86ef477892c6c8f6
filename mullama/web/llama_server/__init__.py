"""What llama-server and vLLM offer beside OpenAI's API: tokens, templates, properties, slots."""
