"""A city that nobody lives in, its people, and their check-ins as raw files of each format. No torch here."""
