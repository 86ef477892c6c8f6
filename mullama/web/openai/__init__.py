"""The OpenAI API: chat, completions, models; their schemas, fields and responses."""
