"""Nets that pznet compiled: the backend and its engine, and a net in a process of its own."""
