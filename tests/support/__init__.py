"""What several test modules use: factories and strategies. Import as ``support.<module>`` (pytest's pythonpath)."""
