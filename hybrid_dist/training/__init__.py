"""Phases in order, one loop, its steps; tasks, optimizer and schedule."""
