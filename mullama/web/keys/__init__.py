"""Who may ask: the keys of options and of the key file, what each may do, and how much of it."""
