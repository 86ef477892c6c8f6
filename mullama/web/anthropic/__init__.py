"""Anthropic's Messages API: ``/v1/messages``, over the same requests as OpenAI's chat."""
