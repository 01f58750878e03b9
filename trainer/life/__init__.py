"""The facts and files of a run: its folder, attempts, lease, stop, events and heartbeats. No torch."""
