"""Training people can leave alone."""
