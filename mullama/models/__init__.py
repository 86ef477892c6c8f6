"""References, sources, the store, and what a GGUF file says of itself. No compiled code.

``reference`` parses what a user wrote, ``sources`` says who fetches it, ``store`` keeps what was fetched,
``gguf`` reads and checks the file.
"""
