"""The faults that a run must survive, each done to real processes on the CPU: `make faults`."""
