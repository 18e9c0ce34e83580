"""Format results for people: tables and pictures."""
