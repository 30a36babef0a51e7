"""What every part leans on: files written whole, seeds, progress, provenance and quiet libraries."""
