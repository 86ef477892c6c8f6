"""Ways of computing products of weights, and quantising, for processes of their own."""
