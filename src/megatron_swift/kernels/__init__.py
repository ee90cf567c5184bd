"""Fast paths, each with a plain twin that gives the same results."""
