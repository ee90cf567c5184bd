"""One optimizer step, the loop around it, schedules and metrics."""
