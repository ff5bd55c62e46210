"""The curve-matching harness: judges with statistics whether training runs match a reference. It only reads files."""
