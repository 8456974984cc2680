"""The loop: plan, execute, commit. Joins control and compute, and turns tokens into text."""
