"""Step 2, in one process and between machines: the loop, messages and their checks; kits, the server, the silos."""
