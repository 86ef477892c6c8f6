"""OpenAI's Responses API, ``/v1/responses``: over the same requests as chat, with a store of answers."""
