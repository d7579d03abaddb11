"""Plots, and figures that answer in a page without a kernel."""
