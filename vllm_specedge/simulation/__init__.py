"""Simulation of the shipping decisions in virtual time."""
