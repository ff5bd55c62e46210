"""Speed, measured beside peers in one run. Never a test: see README.md here."""
