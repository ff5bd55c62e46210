"""One file, one method of preference optimization; it imports the core only."""
