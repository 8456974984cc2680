"""What to run next, and where it may put its K/V: decisions only. No torch, no clock, no input or output."""
