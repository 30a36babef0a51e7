"""A run, or two, as one HTML file that needs no network and no JavaScript."""
