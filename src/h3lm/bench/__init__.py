"""Measured speed, and the health of the fast paths on this machine."""
