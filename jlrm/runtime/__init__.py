"""Processes, devices and files: what any command needs before it does its own work."""
