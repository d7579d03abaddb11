"""Data that know their own: whether an image could be one of theirs, and if not, what is wrong with it."""
