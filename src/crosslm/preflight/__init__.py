"""Before a run: starting a task, looking for what would stop it, and the memory that it will take."""
