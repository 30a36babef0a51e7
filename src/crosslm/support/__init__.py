"""What every part leans on: files written whole, seeds, progress, provenance, and others' words made fit to show."""
