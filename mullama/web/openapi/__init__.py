"""``/openapi.json`` and ``/docs``: the API described, made from its routes and from the schemas that validate."""
