"""How good, how rare, how sure: intervals, filters, distances, densities, and scores of finished samples."""
