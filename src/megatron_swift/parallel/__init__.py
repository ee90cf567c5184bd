"""How a model spreads over ranks. The only package that may ask how many ranks there are."""
