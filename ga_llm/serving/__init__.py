"""A trained model in use: export to a plain folder with its card, recommendations, a map."""
