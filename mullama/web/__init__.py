"""The HTTP server: an OpenAI-compatible Falcon app on uvicorn. ``create_app`` lists every route. Internal."""
