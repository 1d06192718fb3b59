"""The losses: equations, objectives, bootstrap targets, and who owns the parameters."""
