"""Step 2: how an upload comes and a download goes."""
