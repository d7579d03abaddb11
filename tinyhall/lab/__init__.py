"""The book's experiments: their settings, how each is run, what it leaves behind, and the bench."""
