"""The page that explains an evaluation: what it says, its pictures, its HTML."""
