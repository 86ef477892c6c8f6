"""What constrains texts: llguidance's library, grammars, and matchers that hold sequences to them."""
