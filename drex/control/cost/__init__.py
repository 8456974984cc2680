"""What a pass takes: profiles, and the model that learns from passes."""
