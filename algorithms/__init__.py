"""One file, one algorithm; it imports the core and the environments, never another algorithm."""
