"""Servers under load: clients, arrivals, what they waited for."""
