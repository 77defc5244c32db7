"""Trained models at work: opened, measured, made to continue text and to answer sources."""
