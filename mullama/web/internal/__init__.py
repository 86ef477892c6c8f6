"""``/internal``: one file of routes a subject, and what each kind of key is shown."""
