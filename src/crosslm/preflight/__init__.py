"""Before a run: starting a task, checking what is there, and how much memory it will take."""
